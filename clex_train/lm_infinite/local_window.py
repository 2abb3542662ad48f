"""Local part of Lambda attention: queries attend to the keys of their windows, block by block.

Queries and keys come rotated. Computed by explicit matrices, or by SDPA's fused kernel where it applies.
Shapes: `B` batch, `H` heads, `K` key heads, `C` queries of a block, `T` keys, `D` head dim.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clex_train.attention.partial_softmax import (
    PartialAttention,
    SoftmaxRule,
    attend,
    attend_anticausal,
    attend_causal,
    can_fuse,
    merge_,
)
from clex_train.lm_infinite.stream import KeyValues, Place

MIN_BLOCK, MAX_BLOCK = 64, 1024


def default_block_len(n_local: int) -> int:
    """Return C = L / 2 within bounds."""
    # Half a window balances masked scores against the number of calls. The CPU kernel takes larger tiles from 768
    # queries on, so blocks grow to 1,024.
    return min(max(n_local // 2, MIN_BLOCK), MAX_BLOCK)


def attend_window(
    query: Float[Tensor, "B H C D"],
    window: KeyValues,
    place: Place,
    padding: Tensor | None,
    n_local: int,
    rule: SoftmaxRule,
) -> PartialAttention:
    """Attend to the keys at 0 <= i - j < L that are not padding."""
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    # In the middle of a stream every query sees L keys; at its beginning the block is plainly causal.
    is_whole_band = num_keys == num_queries + n_local - 1 and num_queries < n_local
    is_causal = place.offset + num_queries == num_keys <= n_local
    fits = padding is None and num_queries >= MIN_BLOCK and rule.slopes is None and can_fuse(query, *window, rule)
    if fits and (is_whole_band or is_causal):
        return _band(query, window, is_whole_band, rule)
    # A decoding step: one query, with a window of at most L keys, needs no mask.
    sees_all = num_queries == 1 and place.offset + 1 == num_keys <= n_local and padding is None
    if sees_all and rule.slopes is None:
        return attend(query, *window, None, rule)
    distance = _distances(num_queries, num_keys, place, query.device)
    visible = None if sees_all else _in_window(distance, place, padding, n_local)
    return attend(query, *window, visible, rule, distance)


def _band(query: Float[Tensor, "B H C D"], window: KeyValues, is_whole: bool, rule: SoftmaxRule) -> PartialAttention:
    """Attend to the window's band without a mask: a rectangle between two triangles.

    The last C keys are the queries' own, seen causally. Of a whole band the first C - 1 keys are leaving: query i sees
    those after i.
    """
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    own = num_keys - num_queries
    # A masked rectangle would compute C of its L + C columns for nothing; the three parts compute none.
    part = attend_causal(query, *window.span(own, num_keys), rule)
    leaving = num_queries - 1 if is_whole else 0
    if own > leaving:
        merge_(part, attend(query, *window.span(leaving, own), None, rule))
    if is_whole:
        # The last query sees none of the leaving keys, so it takes no part in this.
        last = attend_anticausal(query[:, :, :-1], *window.span(0, leaving), rule)
        merge_(PartialAttention(part.output[:, :, :-1], part.log_sum_exp[:, :, :-1]), last)
    return part


def _distances(num_queries: int, num_keys: int, place: Place, device: torch.device) -> Tensor:
    rank = torch.arange(place.offset, place.offset + num_queries, device=device)
    return rank[:, None] - torch.arange(num_keys, device=device)


def _in_window(distance: Tensor, place: Place, padding: Tensor | None, n_local: int) -> Bool[Tensor, "#B 1 S T"]:
    """Return where a key is visible."""
    visible = ((distance >= 0) & (distance < n_local))[None, None]
    if padding is None:
        return visible
    key = torch.arange(distance.shape[1], device=distance.device)
    return visible & (key + place.first_key >= padding[:, None])[:, None, None]
