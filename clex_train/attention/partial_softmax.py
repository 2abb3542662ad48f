"""Attention over a part of the keys with its log-sum-exp, and the exact merge of two such parts.

    out = sum_j softmax(s)_j v_j = (1 - w) out_1 + w out_2,   w = sigmoid(lse_2 - lse_1),   lse = log sum_j exp(s_j)

Shapes: `B` batch, `H` heads, `K` key heads (H a multiple of K), `S` queries, `T` keys, `D` and `V` head dims.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class SoftmaxRule:
    """Map from q.k to attention weights: scale, dropout, Gemma 2's soft cap c * tanh(s / c), ALiBi slopes."""

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    slopes: Float[Tensor, " H"] | None = None
    """ALiBi: a score falls by its head's slope times the distance to the key."""


class PartialAttention(NamedTuple):
    """Attention over some of the keys. A query that sees none has a log-sum-exp near the lowest float."""

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
    """Attend to the keys that are `visible` (None: all), in float32 at least.

    `distance` [S, T] is the distance that ALiBi's slopes apply to; without it every key counts as at distance 0
    (see `add_distance_bias`).
    """
    num_rows, num_heads, num_queries, _ = query.shape
    # Fold the query heads of a group into the query axis: repeating keys instead would copy the whole cache.
    group = num_heads // keys.shape[1]
    folded = query.reshape(num_rows, keys.shape[1], group * num_queries, -1)
    if visible is not None and group > 1:
        visible = visible.repeat(1, 1, group, 1)
    bias = None
    if rule.slopes is not None and distance is not None:
        # bfloat16 has 8 bits of mantissa, so distances beyond 256 would collapse; keep the bias in float32.
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
    """Attend from query i to keys 0..i with the fused kernel, which skips tiles above the diagonal."""
    group = query.shape[1] // keys.shape[1]
    # The kernel has no grouped heads, and folding would break its triangle. One block of keys is cheap to copy.
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))
    return _kernel(query, keys, values, None, rule, is_causal=True)


def attend_anticausal(
    query: Float[Tensor, "B H S D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S V"],
    rule: SoftmaxRule,
) -> PartialAttention:
    """Attend from query i to keys i..S-1."""
    # The kernel knows causal masks only; read from the end, this one is causal.
    part = attend_causal(query.flip(2), keys.flip(2), values.flip(2), rule)
    return PartialAttention(part.output.flip(2), part.log_sum_exp.flip(2))


def merge(first: PartialAttention, second: PartialAttention) -> PartialAttention:
    """Merge attention over two disjoint sets of keys."""
    # sigmoid(lse_2 - lse_1) cannot overflow, unlike exp(lse_2) / (exp(lse_1) + exp(lse_2)).
    weight = torch.sigmoid(second.log_sum_exp - first.log_sum_exp).unsqueeze(-1)
    dtype = torch.promote_types(first.output.dtype, weight.dtype)
    output = torch.lerp(first.output.to(dtype), second.output.to(dtype), weight.to(dtype))
    return PartialAttention(output.to(first.output.dtype), torch.logaddexp(first.log_sum_exp, second.log_sum_exp))


def merge_(first: PartialAttention, second: PartialAttention) -> None:
    """Merge `second` into `first` in place, without gradients."""
    weight = torch.sigmoid(second.log_sum_exp - first.log_sum_exp).unsqueeze(-1)
    if weight.dtype == first.output.dtype:
        first.output.lerp_(second.output, weight)
    else:
        first.output.copy_(torch.lerp(first.output.to(weight.dtype), second.output.to(weight.dtype), weight))
    first.log_sum_exp.copy_(torch.logaddexp(first.log_sum_exp, second.log_sum_exp))


def add_distance_bias(part: PartialAttention, rule: SoftmaxRule, distance: float) -> PartialAttention:
    """Apply ALiBi to a part whose keys are all at the same `distance`."""
    if rule.slopes is None:
        return part
    # A constant per head cancels in the softmax, so only the log-sum-exp moves.
    return PartialAttention(part.output, part.log_sum_exp - rule.slopes[:, None].to(part.log_sum_exp) * distance)


def _explicit(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, rule: SoftmaxRule, bias: Tensor | None
) -> PartialAttention:
    """Compute attention from its definition, in float32 at least; differentiable in everything."""
    scores = attention_scores(query, keys, rule.scaling)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, masked_score(scores.dtype))
    log_sum_exp = scores.logsumexp(dim=-1)
    # exp(s - lse) is the softmax; reusing the log-sum-exp saves a second reduction over the keys.
    weights = nn.functional.dropout((scores - log_sum_exp.unsqueeze(-1)).exp(), rule.dropout)
    return PartialAttention(weights.to(values.dtype) @ values, log_sum_exp)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, rule: SoftmaxRule, bias: Tensor | None
) -> PartialAttention:
    """Compute attention with the CPU kernel behind scaled_dot_product_attention."""
    if visible is not None:
        added = torch.zeros((), dtype=query.dtype) if bias is None else bias
        # The kernel accepts a float32 bias with bfloat16 queries, which keeps far ALiBi distances apart.
        bias = torch.where(visible, added, masked_score(query.dtype))
    return _kernel(query, keys, values, bias, rule)


def _kernel(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, rule: SoftmaxRule, is_causal: bool = False
) -> PartialAttention:
    # The public function drops the log-sum-exp, which the merge needs. The kernel has no gradient for it.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return PartialAttention(*kernel(query, keys, values, 0.0, is_causal, attn_mask=bias, scale=rule.scaling))


def attention_scores(
    query: Float[Tensor, "*B S D"], keys: Float[Tensor, "*B T D"], scaling: float
) -> Float[Tensor, "*B S T"]:
    """Compute scaling * q.k in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.is_cuda and query.dtype != wide and not _wants_gradient(query, keys):
        # `out_dtype` (CUDA only) keeps the product from being rounded to the dtype of the keys.
        flat = torch.bmm(query.flatten(0, -3), keys.flatten(0, -3).transpose(1, 2), out_dtype=wide)
        scores: Tensor = flat.unflatten(0, query.shape[:-2]) * scaling
        return scores
    return (query @ keys.transpose(-1, -2)).to(wide) * scaling


def can_fuse(query: Tensor, keys: Tensor, values: Tensor, rule: SoftmaxRule) -> bool:
    """Return True if the fused kernel supports the call: on a CPU, without gradients, soft cap or dropout."""
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
    """Return a score for masked keys: finite, and far below every real one."""
    # With -inf, a query that sees nothing would produce NaN. Half the minimum leaves room to add a bias.
    return torch.finfo(dtype).min / 2
