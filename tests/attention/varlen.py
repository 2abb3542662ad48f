"""A plain-torch stand-in for FlashAttention's varlen function, used by transformers on a CPU.

`flash_attention_2` of transformers calls `flash_attn_varlen_func(q, k, v, cu_seqlens_q=..., ...)` on a GPU only. The
back end `varlen` registered here runs transformers' own forward up to that call and computes the result.
Shapes: q, k, v [tokens, heads, D].
"""

import math
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "varlen"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    **_: Any,
) -> Tensor:
    """Attend within each document, one after another."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
    scale = softmax_scale or 1 / math.sqrt(q.shape[-1])
    parts = [
        _document(q[a:b], k[a:b], v[a:b], scale, window_size[0], softcap)
        for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
    ]
    return torch.cat(parts)


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ahead = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (ahead >= 0) & (ahead <= window) if window >= 0 else ahead >= 0
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -math.inf).softmax(dim=-1), v)


class _Arguments:
    """Hold the arguments of the varlen call: one function in transformers 5.17, a pair in 5.23."""

    def __iter__(self) -> Any:
        return iter((self, None))

    def __call__(self, **given: Any) -> dict[str, Any]:
        window = given["sliding_window"]
        lengths = {key: given[key] for key in ("max_seqlen_q", "max_seqlen_k") if key in given}
        # transformers counts a window of n keys as n - 1 to the left.
        sides = (-1, -1) if window is None else (window - 1, window - 1)
        return {
            **lengths,
            "causal": given["is_causal"],
            "softmax_scale": given["softmax_scale"],
            "window_size": sides,
            "softcap": given["softcap"] or 0.0,
        }


def _forward(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Run transformers' flash attention with its GPU lookups replaced for the call."""
    functions = ((_refuse, attend, None, None, None), _Arguments())
    with patch.object(utils, "lazy_import_flash_attention", lambda *_: functions):
        return flash_attention_forward(module, *args, **kwargs)


def _refuse(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the function for rows without documents was called")


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, flash_attention_mask)
