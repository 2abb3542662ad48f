"""Exact attention of a chunk to a long KV cache on a CPU, in bounded memory.

    out = merge(softmax over the T - S cached keys, causal softmax over the chunk's own S keys)

transformers passes SDPA a mask [S, T], which becomes floating point, and repeats grouped keys for every query head. At
64k tokens these two are larger than everything else.
Shapes: `B` batch, `H` heads, `K` key heads, `S` queries, `T` keys, `D` and `V` head dims.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clex_train.attention.partial_softmax import SoftmaxRule, attend, attend_causal, can_fuse, merge

NAME = "chunked_sdpa"


@contextmanager
def chunked_attention(model: nn.Module) -> Iterator[None]:
    """Compute the SDPA calls of `model` in bounded memory while the context is open, with the same result.

    Calls that are not plainly causal (padding, windows, sinks) still go to SDPA.
    """
    # Modules share one config object, so collect by identity and restore each once.
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    chosen: list[Any] = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    for config in chosen:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in chosen:
            config._attn_implementation = "sdpa"


def chunked_sdpa(
    module: nn.Module,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B K T D"],
    value: Float[Tensor, "B K T V"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B S H V"], None]:
    """Attend by transformers' attention interface; without a mask, query i sees keys 0..T - S + i."""
    rule = SoftmaxRule(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout)
    # Soft-capping (Gemma 2), sinks (gpt-oss) and position biases change the scores in ways the fused kernel lacks.
    extra = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    num_cached = key.shape[2] - query.shape[2]
    if attention_mask is not None or extra or not causal or not can_fuse(query, key, value, rule):
        if attention_mask is None and num_cached > 0 and causal:
            # SDPA needs the mask that `omit_causal_mask` left out: its own `is_causal` aligns to the first key.
            shape = (1, 1, query.shape[2], key.shape[2])
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(num_cached)
        arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
        attention: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attention(module, query, key, value, attention_mask, **arguments)
    # The chunk's own keys need a triangle, the cached ones none; two kernel calls replace one masked rectangle.
    part = attend_causal(query, key[:, :, num_cached:], value[:, :, num_cached:], rule)
    if num_cached > 0:
        part = merge(attend(query, key[:, :, :num_cached], value[:, :, :num_cached], None, rule), part)
    return part.output.transpose(1, 2), None


def omit_causal_mask(
    *args: Any,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Return None instead of SDPA's mask where the pattern is causal and nothing is padding."""
    # The queries end where the keys end, so "causal" is fully described by the two lengths.
    tail = q_offset + q_length == kv_offset + kv_length and kv_offset == 0
    # A sliding window longer than all keys hides nothing.
    is_whole = local_size is None or kv_length <= local_size
    if allow_is_causal_skip and tail and is_whole and (attention_mask is None or bool(attention_mask.all())):
        return None
    make_mask: Callable[..., Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return make_mask(
        *args,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


AttentionInterface.register(NAME, chunked_sdpa)
AttentionMaskInterface.register(NAME, omit_causal_mask)
