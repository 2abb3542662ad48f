"""The tokens between the starting ones and the local window, which LM-Infinite leaves out: two ways to let them in.

A key j of query i is in the middle when i - j >= L and j >= G. Without either way no query sees one. Both ways need
all keys, so the cache is one that keeps everything, and cost O(n) a query; scores are made for one block of queries
and `chunk_len` keys at a time. Shapes: `B` batch, `H` heads, `K` key heads, `S` queries, `T` keys, `D`, `V` widths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clex_train.attention.partial_softmax import (
    PartialAttention,
    SoftmaxRule,
    add_distance_bias,
    attend,
    attention_scores,
    masked_score,
    merge,
)
from clex_train.lm_infinite.stream import KeyValues, Rotation

MIN_CHUNK = 1024

Visible = Callable[[int, int], Tensor]
"""Which keys first..last-1 of the middle each query sees, bool [#B, 1, S, T]."""


@runtime_checkable
class Middle(Protocol):
    """What a layer sees of the middle."""

    def attend(
        self,
        query: Tensor,
        far: KeyValues,
        visible: Visible,
        rotation: Rotation,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """Attention of unrotated queries to the unrotated keys of `far` that are `visible`."""

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """What this layer sees; None for nothing."""


@dataclass(frozen=True)
class WholeMiddle:
    """Every token of the middle at distance L: the limit of the distance alone, without the mask (section 4 of the
    paper). Keys that the mask would hide take part, none is farther than L."""

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """The same in every layer."""
        return self

    def attend(
        self,
        query: Float[Tensor, "B H S D"],
        far: KeyValues,
        visible: Visible,
        rotation: Rotation,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """See `Middle`."""
        rotated, size, merged = rotation.constant(query, n_local), chunk_len(n_local), None
        for first in range(0, far.keys.shape[2], size):
            keys, values = far.span(first, first + size)
            part = attend(rotated, rotation.constant(keys, 0), values, visible(first, first + keys.shape[2]), rule)
            merged = part if merged is None else merge(merged, part)
        assert merged is not None
        return add_distance_bias(merged, rule, n_local)


@dataclass(frozen=True)
class BestMiddle:
    """For every query and head the `num_keys` best keys of the middle, by their score at distance L / 2, at which they
    are also seen, in layers `first_layer` and up.

    The paper's option has k = 5. Its code selects for the last query of a call only, so a prompt read at once and one
    read in pieces differ; here every query selects by itself, and the cache does not matter.
    """

    num_keys: int = 5
    first_layer: int = 5

    def __post_init__(self) -> None:
        if self.num_keys < 1 or self.first_layer < 0:
            raise ValueError(
                f"BestMiddle(num_keys={self.num_keys}, first_layer={self.first_layer}): at least 1 key and layer 0"
            )

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """Nothing below `first_layer`."""
        return self if layer_idx >= self.first_layer else None

    def attend(
        self,
        query: Float[Tensor, "B H S D"],
        far: KeyValues,
        visible: Visible,
        rotation: Rotation,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """See `Middle`."""
        num_rows, num_heads, num_queries, _ = query.shape
        num_groups = far.keys.shape[1]
        rotated = rotation.constant(query, n_local // 2)
        folded = rotated.reshape(num_rows, num_groups, num_heads // num_groups * num_queries, -1)
        keys = rotation.constant(far.keys, 0)
        index, is_middle = self._select(folded, keys, visible, num_heads // num_groups, n_local)
        part = _attend_selected(folded, keys, far.values, index, is_middle, rule)
        heads = (num_rows, num_heads, num_queries)
        return add_distance_bias(
            PartialAttention(part.output.reshape(*heads, -1), part.log_sum_exp.reshape(heads)), rule, n_local // 2
        )

    @torch.no_grad()
    def _select(
        self,
        query: Float[Tensor, "B K S D"],
        keys: Float[Tensor, "B K T D"],
        visible: Visible,
        group: int,
        n_local: int,
    ) -> tuple[Int[Tensor, "B K S k"], Bool[Tensor, "B K S k"]]:
        """The best keys of each query, and which of them there are: the middle may hold fewer."""
        size = chunk_len(n_local)
        # In bfloat16 many scores are equal, and which of them are kept would depend on the shape of a call.
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = query.to(dtype)
        kept = query.new_empty(*query.shape[:3], 0)
        kept_index = torch.empty_like(kept, dtype=torch.int64)
        for first in range(0, keys.shape[2], size):
            chunk = keys[:, :, first : first + size].to(dtype)
            hidden = ~visible(first, first + chunk.shape[2]).repeat(1, 1, group, 1)
            scores = (query @ chunk.transpose(-1, -2)).masked_fill_(hidden, float("-inf"))
            best, index = scores.topk(min(self.num_keys, scores.shape[-1]), dim=-1)
            best, index = torch.cat((kept, best), dim=-1), torch.cat((kept_index, index + first), dim=-1)
            kept, order = best.topk(min(self.num_keys, best.shape[-1]), dim=-1)
            kept_index = index.gather(-1, order)
        return kept_index, kept.isfinite()


def chunk_len(n_local: int) -> int:
    """Keys of the middle that are scored at one go: about as many as a window has."""
    return max(n_local, MIN_CHUNK)


def middle_mask(
    num_queries: int,
    first_query: int,
    padding: Tensor | None,
    n_local: int,
    n_global: int,
    device: torch.device,
    first: int,
    last: int,
) -> Bool[Tensor, "#B 1 S T"]:
    """Where i - j >= L and j >= G of keys first..last-1, j counted without the `padding` [B] at the front of a row."""
    query = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    key = torch.arange(first, last, device=device)
    outside = (query - key >= n_local)[None, None]
    if padding is None:
        return outside & (key >= n_global)
    return outside & (key - padding[:, None] >= n_global)[:, None, None]


def _attend_selected(
    query: Float[Tensor, "B K S D"],
    keys: Float[Tensor, "B K T D"],
    values: Float[Tensor, "B K T V"],
    index: Int[Tensor, "B K S k"],
    is_middle: Bool[Tensor, "B K S k"],
    rule: SoftmaxRule,
) -> PartialAttention:
    """Attention of each query to keys of its own."""
    flat = index.flatten(2)[..., None]
    own_keys, own_values = (x.take_along_dim(flat, dim=2).unflatten(2, index.shape[2:]) for x in (keys, values))
    scores = attention_scores(query[..., None, :], own_keys, rule.scaling).squeeze(-2)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~is_middle, masked_score(scores.dtype))
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = nn.functional.dropout((scores - log_sum_exp.unsqueeze(-1)).exp(), rule.dropout)
    return PartialAttention((weights.to(values.dtype)[..., None, :] @ own_values).squeeze(-2), log_sum_exp)
