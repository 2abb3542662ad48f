"""Attention over a part of the keys with the log-sum-exp of its scores, and the joining of two such parts.

    out = sum_j softmax(s)_j v_j = (1 - w) out_1 + w out_2,   w = sigmoid(lse_2 - lse_1),   lse = log sum_j exp(s_j)

Shapes: `B` batch, `H` heads, `K` key heads (H a multiple of K), `S` queries, `T` keys, `D` and `V` widths.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class SoftmaxRule:
    """What stands between scores and weights: factor on q.k, dropout, Gemma 2's c * tanh(s / c), ALiBi's slopes."""

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    slopes: Float[Tensor, " H"] | None = None
    """ALiBi: a query's score falls by its head's slope times the distance of the key."""


class PartialAttention(NamedTuple):
    """Attention over some of the keys. A query that sees none has a log-sum-exp near the least float."""

    output: Float[Tensor, "B H S V"]
    log_sum_exp: Float[Tensor, "B H S"]


def attend(
    query: Float[Tensor, "B H S D"],
    keys: Float[Tensor, "B K T D"],
    values: Float[Tensor, "B K T V"],
    visible: Bool[Tensor, "#B 1 S T"] | None,
    rule: SoftmaxRule,
    distance: Int[Tensor, "S T"] | None = None,
) -> PartialAttention:
    """Attention where `visible` (None: everywhere). The query heads that share a key are folded into the queries.

    `distance` is what ALiBi's slopes go by; without it every key is as if at distance 0 (see `add_distance_bias`).
    """
    num_rows, num_heads, num_queries, _ = query.shape
    group = num_heads // keys.shape[1]
    folded = query.reshape(num_rows, keys.shape[1], group * num_queries, -1)
    if visible is not None and group > 1:
        visible = visible.repeat(1, 1, group, 1)
    bias = None
    if rule.slopes is not None and distance is not None:
        slopes = rule.slopes.to(torch.promote_types(query.dtype, torch.float32))
        lowered = slopes[:, None, None] * -distance.to(slopes.dtype)
        bias = lowered.reshape(1, keys.shape[1], group * num_queries, -1)
    compute = _fused if can_fuse(folded, keys, values, rule) else _explicit
    output, log_sum_exp = compute(folded, keys, values, visible, rule, bias)
    return PartialAttention(
        output.reshape(num_rows, num_heads, num_queries, -1), log_sum_exp.reshape(num_rows, num_heads, num_queries)
    )


def attend_causal(
    query: Float[Tensor, "B H S D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S V"],
    rule: SoftmaxRule,
) -> PartialAttention:
    """Attention of query i to keys 0..i by the fused kernel, which passes over what lies above the diagonal."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))
    return _kernel(query, keys, values, None, rule, is_causal=True)


def attend_anticausal(
    query: Float[Tensor, "B H S D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S V"],
    rule: SoftmaxRule,
) -> PartialAttention:
    """Attention of query i to keys i..S-1: causal attention read from the end."""
    part = attend_causal(query.flip(2), keys.flip(2), values.flip(2), rule)
    return PartialAttention(part.output.flip(2), part.log_sum_exp.flip(2))


def merge(first: PartialAttention, second: PartialAttention) -> PartialAttention:
    """Attention over the keys of both parts."""
    weight = torch.sigmoid(second.log_sum_exp - first.log_sum_exp).unsqueeze(-1)
    dtype = torch.promote_types(first.output.dtype, weight.dtype)
    output = torch.lerp(first.output.to(dtype), second.output.to(dtype), weight.to(dtype))
    return PartialAttention(output.to(first.output.dtype), torch.logaddexp(first.log_sum_exp, second.log_sum_exp))


def merge_(first: PartialAttention, second: PartialAttention) -> None:
    """`merge`, written into `first`; without gradients."""
    weight = torch.sigmoid(second.log_sum_exp - first.log_sum_exp).unsqueeze(-1)
    if weight.dtype == first.output.dtype:
        first.output.lerp_(second.output, weight)
    else:
        first.output.copy_(torch.lerp(first.output.to(weight.dtype), second.output.to(weight.dtype), weight))
    first.log_sum_exp.copy_(torch.logaddexp(first.log_sum_exp, second.log_sum_exp))


def add_distance_bias(part: PartialAttention, rule: SoftmaxRule, distance: float) -> PartialAttention:
    """A part whose keys all have the same `distance`: by ALiBi one term per head, which leaves the weights alone."""
    if rule.slopes is None:
        return part
    return PartialAttention(part.output, part.log_sum_exp - rule.slopes[:, None].to(part.log_sum_exp) * distance)


def _explicit(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, rule: SoftmaxRule, bias: Tensor | None
) -> PartialAttention:
    """By its definition, in float32 at least; differentiable in everything."""
    scores = attention_scores(query, keys, rule.scaling)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, masked_score(scores.dtype))
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = nn.functional.dropout((scores - log_sum_exp.unsqueeze(-1)).exp(), rule.dropout)
    return PartialAttention(weights.to(values.dtype) @ values, log_sum_exp)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, rule: SoftmaxRule, bias: Tensor | None
) -> PartialAttention:
    """By the kernel behind scaled_dot_product_attention on a CPU, which has the log-sum-exp but no gradient of it.

    It takes a `bias` of float32 beside bfloat16, in which far distances would run together.
    """
    if visible is not None:
        added = torch.zeros((), dtype=query.dtype) if bias is None else bias
        bias = torch.where(visible, added, masked_score(query.dtype))
    return _kernel(query, keys, values, bias, rule)


def _kernel(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, rule: SoftmaxRule, is_causal: bool = False
) -> PartialAttention:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return PartialAttention(*kernel(query, keys, values, 0.0, is_causal, attn_mask=bias, scale=rule.scaling))


def attention_scores(
    query: Float[Tensor, "*B S D"], keys: Float[Tensor, "*B T D"], scaling: float
) -> Float[Tensor, "*B S T"]:
    """scaling * q.k in float32 at least; on a GPU without gradients never rounded to the dtype of the keys."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.is_cuda and query.dtype != wide and not _wants_gradient(query, keys):
        flat = torch.bmm(query.flatten(0, -3), keys.flatten(0, -3).transpose(1, 2), out_dtype=wide)
        return flat.unflatten(0, query.shape[:-2]) * scaling
    return (query @ keys.transpose(-1, -2)).to(wide) * scaling


def can_fuse(query: Tensor, keys: Tensor, values: Tensor, rule: SoftmaxRule) -> bool:
    """Whether the fused kernel computes this: on a CPU, without gradients, soft-capping or dropout."""
    plain = rule.softcap is None and rule.dropout == 0.0 and keys.shape[-1] == values.shape[-1]
    return (
        plain
        and not _wants_gradient(query, keys, values)
        and query.device.type == "cpu"
        and query.dtype != torch.float16
    )


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def masked_score(dtype: torch.dtype) -> float:
    """Finite, so that a query that sees nothing makes no NaN, and far below every score."""
    return torch.finfo(dtype).min / 2
