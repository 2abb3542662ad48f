"""Slow reference of per-token log-scaling: attention in float64 whose factors count the mask that transformers made."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "counted_keys"
CONTEXT_LEN = "counted_keys_context_len"


@contextmanager
def counted_keys(model: nn.Module, context_len: int) -> Iterator[None]:
    """Let `model` attend by the reference while the context is open."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    for module in model.modules():
        setattr(module, CONTEXT_LEN, context_len)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).double() for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    # [B, 1, S]: the keys that the mask shows each query. Padding sees none, and gets a row of zeros below.
    counts = mask.sum(dim=-1)
    factors = [max(1.0, math.log(max(n, 1)) / math.log(getattr(module, CONTEXT_LEN))) for n in counts.flatten()]
    scores = scores * torch.tensor(factors, dtype=torch.float64).view(*counts.shape, 1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num()
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None


def _whole_mask(*args: Any, **options: Any) -> Tensor:
    mask = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _whole_mask)
