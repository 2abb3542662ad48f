"""Lambda-shaped attention of LM-Infinite: a local window and the starting tokens, in time and memory O(n).

    query i sees key j <= i when i - j < L (at distance i - j) or j < G (at distance min(i - j, L)), each key once

Han et al., arXiv 2308.16137, section 4. Queries are taken in blocks of C: a block has a local part, over the C + L - 1
keys that its window reaches, and a global part over the starting keys that have left the window; the two are joined
by their log-sum-exp. Every block is rotated from its own first key on, so that no angle grows with the stream.
Keys come unrotated. Shapes: `B` batch, `H` heads, `K` key heads, `S` queries, `T` keys, `G` starting tokens, `D` width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clex_train.attention.partial_softmax import (
    Part,
    SoftmaxRule,
    attend,
    attend_anticausal,
    attend_causal,
    can_fuse,
    join,
)

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 1024


@runtime_checkable
class Rotation(Protocol):
    """How a model turns queries and keys [B, H, S, D] by position; only distances matter, so positions stay small."""

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        """`x` with its tokens at positions first, first + 1, ..."""

    def constant(self, x: Tensor, position: int) -> Tensor:
        """`x` with every token at `position`."""


class KeyValues(NamedTuple):
    """Unrotated keys and their values."""

    keys: Float[Tensor, "B K T D"]
    values: Float[Tensor, "B K T V"]

    def span(self, first: int, last: int) -> "KeyValues":
        """Tokens first..last-1."""
        return KeyValues(self.keys[:, :, first:last], self.values[:, :, first:last])


class Turned(NamedTuple):
    """The keys of a window rotated already, the first of them at `position`, for a cache that keeps them so."""

    keys: Float[Tensor, "B K T D"]
    position: int


@dataclass(frozen=True)
class Stream:
    """Where a call stands: `num_tokens` were seen by its end, of which `num_padding` [B] at the front are padding."""

    num_tokens: int
    num_padding: Int[Tensor, " B"] | None = None


def lambda_attention(
    query: Float[Tensor, "B H S D"],
    window: KeyValues,
    start: KeyValues | None,
    stream: Stream,
    n_local: int,
    rotation: Rotation,
    rule: SoftmaxRule,
    block_len: int | None = None,
    turned: Turned | None = None,
) -> Float[Tensor, "B H S V"]:
    """Attention of the last S tokens of a stream. Padded queries get finite values without meaning.

    `window` holds the last T >= S tokens (all, or at least the S + L - 1 last), `start` the first G that are not
    padding in each row (None for G = 0), at any time also those that are in the window. `block_len` is C; memory
    beyond the result is O(C (C + L)), with gradients O(n). `turned` spares the rotation of the window's keys.
    """
    size = block_len or default_block_len(n_local)
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    assert num_keys >= min(num_queries + n_local - 1, stream.num_tokens), "the window is shorter than its reach"
    tensors = [query, *window, *(start or ())]
    recompute = num_queries > size and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    past, outputs, base = num_keys - num_queries, [], 0
    span_len = rotated_span_len(n_local, size)
    for first in range(0, num_queries, size):
        last = min(first + size, num_queries)
        low, high = max(0, past + first - n_local + 1), past + last
        if turned is None and not recompute and first % span_len == 0:
            base = low
            span = window.keys[:, :, low : past + min(first + span_len, num_queries)]
            rotated = rotation.consecutive(span, 0)
        keys = None
        if turned is not None:
            keys = Turned(turned.keys[:, :, low:high], turned.position + low)
        elif not recompute:
            keys = Turned(rotated[:, :, low - base : high - base], low - base)
        place = _Place(past + first - low, stream.num_tokens - num_queries + first, stream.num_tokens - num_keys + low)
        arguments = (
            query[:, :, first:last],
            window.span(low, high),
            start,
            place,
            stream,
            n_local,
            rotation,
            rule,
            keys,
        )
        outputs.append(checkpoint(_block, *arguments, use_reentrant=False) if recompute else _block(*arguments))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def default_block_len(n_local: int) -> int:
    """C = L / 4 within bounds: a quarter more scores than the window needs, in matrices large enough to be fast."""
    return min(max(n_local // 4, SMALLEST_BLOCK), LARGEST_BLOCK)


def rotated_span_len(n_local: int, block_len: int) -> int:
    """Queries whose keys are rotated at one go: about 2 L, so that a key is rotated 1.5 times instead of 1 + L / C."""
    return block_len * max(1, 2 * n_local // block_len)


class _Place(NamedTuple):
    """Where a block lies: the first query's index among the block's keys; both firsts in the stream with padding."""

    offset: int
    first_query: int
    first_key: int


def _block(
    query: Float[Tensor, "B H C D"],
    window: KeyValues,
    start: KeyValues | None,
    place: _Place,
    stream: Stream,
    n_local: int,
    rotation: Rotation,
    rule: SoftmaxRule,
    turned: Turned | None,
) -> Float[Tensor, "B H C V"]:
    num_queries = query.shape[2]
    turned = turned or Turned(rotation.consecutive(window.keys, 0), 0)
    turned_query = rotation.consecutive(query, turned.position + place.offset)
    rotated = KeyValues(turned.keys, window.values)
    local = _local_part(turned_query, rotated, place, stream.num_padding, n_local, rule)
    if start is None or place.first_query + num_queries <= n_local:
        return local.output
    left = _outside_window(num_queries, start.keys.shape[2], place, stream.num_padding, n_local, query.device)
    keys = rotation.constant(start.keys, 0)
    return join(local, attend(rotation.constant(query, n_local), keys, start.values, left, rule)).output


def _local_part(
    query: Float[Tensor, "B H C D"],
    window: KeyValues,
    place: _Place,
    padding: Tensor | None,
    n_local: int,
    rule: SoftmaxRule,
) -> Part:
    """Attention of rotated queries to the rotated keys of their windows."""
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    is_whole_band = num_keys == num_queries + n_local - 1 and num_queries < n_local
    is_causal = place.offset + num_queries == num_keys <= n_local
    fits = padding is None and num_queries >= SMALLEST_BLOCK and can_fuse(query, *window, rule)
    if fits and (is_whole_band or is_causal):
        return _band(query, window, is_whole_band, rule)
    visible = _in_window(num_queries, num_keys, place, padding, n_local, query.device)
    return attend(query, *window, visible, rule)


def _band(query: Float[Tensor, "B H C D"], window: KeyValues, is_whole: bool, rule: SoftmaxRule) -> Part:
    """The window's band without a mask: keys that every query sees, between two triangles.

    The last C keys are the queries' own, seen causally. Of a whole band the first C - 1 are leaving: query i still
    sees those after i. No score is computed in vain, which a masked rectangle does for C of its L + C columns.
    """
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    own = num_keys - num_queries
    part = attend_causal(query, *window.span(own, num_keys), rule)
    leaving = num_queries - 1 if is_whole else 0
    if own > leaving:
        part = join(part, attend(query, *window.span(leaving, own), None, rule))
    if not is_whole:
        return part
    # The last query sees none of the leaving keys, so it takes no part in this.
    last = attend_anticausal(query[:, :, :-1], *window.span(0, leaving), rule)
    joined = join(Part(part.output[:, :, :-1], part.log_sum_exp[:, :, :-1]), last)
    return Part(*(torch.cat((x, y[:, :, -1:]), dim=2) for x, y in zip(joined, part, strict=True)))


def _in_window(
    num_queries: int, num_keys: int, place: _Place, padding: Tensor | None, n_local: int, device: torch.device
) -> Bool[Tensor, "#B 1 S T"] | None:
    """Keys at 0 <= i - j < L that are not padding; None when that is all of them."""
    sees_all = num_queries == 1 and place.offset + 1 == num_keys
    if sees_all and padding is None:
        return None
    key = torch.arange(num_keys, device=device)
    distance = torch.arange(place.offset, place.offset + num_queries, device=device)[:, None] - key
    visible = ((distance >= 0) & (distance < n_local))[None, None]
    if padding is None:
        return visible
    return visible & (key + place.first_key >= padding[:, None])[:, None, None]


def _outside_window(
    num_queries: int, num_start: int, place: _Place, padding: Tensor | None, n_local: int, device: torch.device
) -> Bool[Tensor, "#B 1 S G"]:
    """Starting tokens at i - j >= L, both counted without padding."""
    first = place.first_query
    rank = torch.arange(first, first + num_queries, device=device)[None, :, None]
    if padding is not None:
        rank = rank - padding[:, None, None]
    return (rank - torch.arange(num_start, device=device) >= n_local)[:, None]
