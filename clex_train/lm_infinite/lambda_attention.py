"""Lambda-shaped attention of LM-Infinite: a local window plus the starting tokens, in O(n) time and memory.

    query i sees key j <= i when i - j < L (at distance i - j) or j < G (at distance min(i - j, L)), each key once

(Han et al., arXiv 2308.16137, section 4). Queries are processed in blocks of C. A block has a local part, over the
C + L - 1 keys in reach of its window, and a global part, over the starting keys that have left the window. The parts
are merged by their log-sum-exp, and so are the tokens that `middle` adds. Keys come unrotated.
Shapes: `B` batch, `H` heads, `K` key heads, `S` queries, `T` keys, `G` starting tokens, `D` head dim.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clex_train.attention.partial_softmax import PartialAttention, SoftmaxRule, add_distance_bias, attend, merge
from clex_train.lm_infinite.back_ends import BACK_ENDS, BackEnd
from clex_train.lm_infinite.middle_tokens import Middle, middle_mask
from clex_train.lm_infinite.stream import KeyValues, Place, RotatedKeys, Rotation, Stream


@dataclass(frozen=True, eq=False)
class Scheme:
    """Lambda attention of a layer: its window and middle, rotation, softmax, and how to compute it.

    `block_len` counts queries per block; None takes the back end's default.
    """

    n_local: int
    rotation: Rotation
    rule: SoftmaxRule
    block_len: int | None = None
    middle: Middle | None = None
    back_end: BackEnd = BACK_ENDS["sdpa"]


@dataclass(frozen=True, eq=False)
class _Call:
    """Arguments of `lambda_attention` that all its blocks share."""

    window: KeyValues
    start: KeyValues | None
    stream: Stream
    scheme: Scheme

    @property
    def n_global(self) -> int:
        return 0 if self.start is None else self.start.keys.shape[2]


def lambda_attention(
    query: Float[Tensor, "B H S D"],
    window: KeyValues,
    start: KeyValues | None,
    stream: Stream,
    scheme: Scheme,
    rotated_keys: RotatedKeys | None = None,
) -> Float[Tensor, "B H S V"]:
    """Attend from the last S tokens of a stream. Padded queries get finite values without meaning.

    `window` holds the last T >= S tokens: all of them, or without a middle at least the S + L - 1 last ones. `start`
    holds the first G valid tokens of each row (None for G = 0), including those still in the window. `rotated_keys`
    saves rotating the window's keys. Memory beyond the result is O(C (C + L)), with gradients O(n).
    """
    n_local, size = scheme.n_local, scheme.block_len or scheme.back_end.block_len(scheme.n_local)
    num_queries, num_keys = query.shape[2], window.keys.shape[2]
    assert num_keys >= min(num_queries + n_local - 1, stream.num_tokens), "the window is shorter than its reach"
    assert scheme.middle is None or num_keys == stream.num_tokens, "the middle is not there"
    call = _Call(window, start, stream, scheme)
    tensors = [query, *window, *(start or ())]
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # A middle is scored by explicit matrices of C x n on every back end; kept for all blocks they would be n x n.
    makes_scores = scheme.back_end.recomputes or scheme.middle is not None
    recompute = makes_scores and num_queries > size and wants_gradient
    past, outputs, base = num_keys - num_queries, [], 0
    span_len = rotated_span_len(n_local, size)
    for first in range(0, num_queries, size):
        last = min(first + size, num_queries)
        low, high = max(0, past + first - n_local + 1), past + last
        # Rotate a span of several blocks at once, from its own first key on, so that no angle grows with the stream.
        if rotated_keys is None and not recompute and first % span_len == 0:
            base = low
            span = window.keys[:, :, low : past + min(first + span_len, num_queries)]
            rotated = scheme.rotation.consecutive(span, 0)
        keys = None
        if rotated_keys is not None:
            keys = RotatedKeys(rotated_keys.keys[:, :, low:high], rotated_keys.position + low)
        elif not recompute:
            keys = RotatedKeys(rotated[:, :, low - base : high - base], low - base)
        place = Place(past + first - low, stream.num_tokens - num_queries + first, stream.num_tokens - num_keys + low)
        arguments = (query[:, :, first:last], window.span(low, high), place, call, keys)
        # The reentrant variant would ignore tensors inside tuples, such as the window.
        outputs.append(checkpoint(_block, *arguments, use_reentrant=False) if recompute else _block(*arguments))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def rotated_span_len(n_local: int, block_len: int) -> int:
    """Return the number of queries whose keys are rotated at once: about 2 L."""
    # Windows of neighbouring blocks overlap: this rotates each key 1.5 times instead of 1 + L / C times.
    return block_len * max(1, 2 * n_local // block_len)


def _block(
    query: Float[Tensor, "B H C D"], window: KeyValues, place: Place, call: _Call, rotated_keys: RotatedKeys | None
) -> Float[Tensor, "B H C V"]:
    """Compute the attention of one block of queries."""
    scheme = call.scheme
    rotated_keys = rotated_keys or RotatedKeys(scheme.rotation.consecutive(window.keys, 0), 0)
    rotated_query = scheme.rotation.consecutive(query, rotated_keys.position + place.offset)
    rotated = KeyValues(rotated_keys.keys, window.values)
    part = scheme.back_end.attend(rotated_query, rotated, place, call.stream.num_padding, scheme.n_local, scheme.rule)
    # Keys that have left the window of the block's last query; without any, the local part is everything.
    num_left = place.first_query + query.shape[2] - scheme.n_local
    if num_left <= 0:
        return part.output
    if call.start is not None:
        part = merge(part, _global_part(query, call.start, place, call))
    if scheme.middle is not None:
        part = merge(part, _middle_part(query, call.window.span(0, num_left), scheme.middle, place, call))
    return part.output


def _global_part(query: Float[Tensor, "B H C D"], start: KeyValues, place: Place, call: _Call) -> PartialAttention:
    """Attend to the starting tokens that have left the window, all at distance L."""
    n_local, rotation, rule = call.scheme.n_local, call.scheme.rotation, call.scheme.rule
    # No mask where even the first query is far past every starting token: all of them have left.
    left = None
    if call.stream.num_padding is not None or place.first_query - call.n_global + 1 < n_local:
        left = _outside_window(query.shape[2], call.n_global, place, call.stream.num_padding, n_local, query.device)
    # Rotate the G keys by -L instead of all queries by L. The rotation by 0 supplies the factor that YaRN puts into cos
    # and sin, which unrotated queries lack.
    keys = rotation.constant(rotation.constant(start.keys, 0), -n_local)
    return add_distance_bias(attend(query, keys, start.values, left, rule), rule, n_local)


def _middle_part(
    query: Float[Tensor, "B H C D"], far: KeyValues, middle: Middle, place: Place, call: _Call
) -> PartialAttention:
    """Attend to the keys that `middle` lets in among those past the last query's window."""
    scheme, padding = call.scheme, call.stream.num_padding
    where = (query.shape[2], place.first_query, padding, scheme.n_local, call.n_global, query.device)
    visible = partial(middle_mask, *where)
    return middle.attend(query, far, visible, scheme.rotation, scheme.n_local, scheme.rule)


def _outside_window(
    num_queries: int, num_start: int, place: Place, padding: Tensor | None, n_local: int, device: torch.device
) -> Bool[Tensor, "#B 1 S G"]:
    """Return where a starting token is at i - j >= L, both counted without padding."""
    first = place.first_query
    rank = torch.arange(first, first + num_queries, device=device)[None, :, None]
    if padding is not None:
        rank = rank - padding[:, None, None]
    return (rank - torch.arange(num_start, device=device) >= n_local)[:, None]
