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

from clex_train.attention.partial_softmax import SoftmaxRule, attend, join

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
    outputs = []
    for first in range(0, num_queries, size):
        last = min(first + size, num_queries)
        reach = num_keys - num_queries + first
        low, high = max(0, reach - n_local + 1), num_keys - num_queries + last
        place = _Place(reach - low, stream.num_tokens - num_queries + first, stream.num_tokens - num_keys + low)
        keys = None if turned is None else Turned(turned.keys[:, :, low:high], turned.position + low)
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
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    visible = _in_window(num_queries, num_keys, place, stream.num_padding, n_local, query.device)
    turned = turned or Turned(rotation.consecutive(window.keys, 0), 0)
    turned_query = rotation.consecutive(query, turned.position + place.offset)
    local = attend(turned_query, turned.keys, window.values, visible, rule)
    if start is None or place.first_query + num_queries <= n_local:
        return local.output
    left = _outside_window(num_queries, start.keys.shape[2], place, stream.num_padding, n_local, query.device)
    keys = rotation.constant(start.keys, 0)
    return join(local, attend(rotation.constant(query, n_local), keys, start.values, left, rule))


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
