"""Middle tokens, between the starting ones and the local window: two ways to include them in LM-Infinite.

A key j of query i is in the middle when i - j >= L and j >= G; plain LM-Infinite masks it. Both ways need a cache that
keeps all keys, and cost O(n) per query. Scores are computed for one block of queries and `chunk_len` keys at a time.
Shapes: `B` batch, `H` heads, `K` key heads, `S` queries, `T` keys, `D`, `V` head dims.
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

# Smaller chunks would spend their time in kernel launches and top-k merges.
MIN_CHUNK = 1024

Visible = Callable[[int, int], Tensor]
"""(first, last) -> bool [#B, 1, S, T]: which middle keys first..last-1 each query sees."""


@runtime_checkable
class Middle(Protocol):
    """A way to attend to the middle."""

    def attend(
        self,
        query: Tensor,
        far: KeyValues,
        visible: Visible,
        rotation: Rotation,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """Attend from unrotated queries to the unrotated keys of `far` that are `visible`."""

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """Return the middle of this layer; None if it sees none."""


@dataclass(frozen=True)
class WholeMiddle:
    """Every middle token at distance L: the distance limit alone, without the mask (section 4 of the paper)."""

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """Return the same for every layer."""
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
            # All keys share one distance, so rotating the queries by L and the keys by 0 suffices.
            part = attend(rotated, rotation.constant(keys, 0), values, visible(first, first + keys.shape[2]), rule)
            merged = part if merged is None else merge(merged, part)
        assert merged is not None
        return add_distance_bias(merged, rule, n_local)


@dataclass(frozen=True)
class BestMiddle:
    """The `num_keys` best middle keys of each query and head, in layers `first_layer` and up.

    Keys are scored and seen at distance L / 2. The paper uses k = 5.
    """

    num_keys: int = 5
    first_layer: int = 5

    def __post_init__(self) -> None:
        if self.num_keys < 1 or self.first_layer < 0:
            raise ValueError(
                f"BestMiddle(num_keys={self.num_keys}, first_layer={self.first_layer}): "
                "must be at least 1 key and layer 0"
            )

    def for_layer(self, layer_idx: int) -> "Middle | None":
        """Return None below `first_layer`."""
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
        # The official code selects for the last query of a call only, so results depend on how a prompt is split. Here
        # every query selects for itself.
        num_groups = far.keys.shape[1]
        rotated = rotation.constant(query, n_local // 2)
        # Query heads of a group share keys: folded into the query axis, none of the n keys is copied.
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
        """Return the indices of each query's best keys, and which of them exist: the middle may hold fewer."""
        size = chunk_len(n_local)
        # In bfloat16 many scores tie, and which keys win would depend on the shape of the call.
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
            # A running top-k over chunks bounds memory; the scores of all n keys would not fit.
            kept, order = best.topk(min(self.num_keys, best.shape[-1]), dim=-1)
            kept_index = index.gather(-1, order)
        return kept_index, kept.isfinite()


def chunk_len(n_local: int) -> int:
    """Return the number of middle keys scored at once, about as many as a window has."""
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
    """Return where i - j >= L and j >= G for keys first..last-1.

    Index j leaves out the `padding` [B] at the front of a row.
    """
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
    """Attend from each query to its own selected keys."""
    flat = index.flatten(2)[..., None]
    # `take_along_dim` broadcasts over the head dim, so no [.., k, D] index is built.
    own_keys, own_values = (x.take_along_dim(flat, dim=2).unflatten(2, index.shape[2:]) for x in (keys, values))
    scores = attention_scores(query[..., None, :], own_keys, rule.scaling).squeeze(-2)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~is_middle, masked_score(scores.dtype))
    log_sum_exp = scores.logsumexp(dim=-1)
    # A query whose selection is masked throughout gets a log-sum-exp near the lowest float, so `merge` ignores it.
    weights = nn.functional.dropout((scores - log_sum_exp.unsqueeze(-1)).exp(), rule.dropout)
    return PartialAttention((weights.to(values.dtype)[..., None, :] @ own_values).squeeze(-2), log_sum_exp)
