"""The protocols of perplexity: which spans of a window are read at length N, by which function, and what is scored.

    one_shot, per_position   [0, N), [N, 2N), ...         the model as a reader of N tokens; its nll against position
    chunked                  the same spans               official CLEX: through the cache L at a time, t grows
    sliding                  [0, N), [S, S + N), ...      stride S; YaRN (2309.00071, 4.3), LongLoRA (2309.12307, 4)
    last_k                   [W - N, W)                   the last K tokens of a window, after ever more context

A token takes its nll from the first span that holds it behind the span's first token, which has no context (BOS stands
in its place where windows begin with it). Scored
are the tokens that every length gives a nll, so a protocol's columns are averages over the very same tokens. Shapes:
`W` tokens of a window, the largest length.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.evaluation.perplexity import Predict, chunked, one_shot
from clex_train.utils.bounds import require

MOST_BINS = 128
"""Points of a curve of nll against position, at most."""


class Span(NamedTuple):
    """Tokens start..stop-1 of a window, read at once; tokens first..stop-1 take their nll from it."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """How one protocol reads every window."""

    protocol: Protocol
    read: Predict
    spans: Mapping[int, tuple[Span, ...]]
    """For each length, spans of that length in ascending order."""
    scored: np.ndarray
    """bool [W]: the tokens of a window that count, at every length."""
    most_bins: int = 0
    """Points of the curve of nll against position that goes with the number."""


def readings(spec: EvaluationConfig, context_len: int) -> list[Reading]:
    """A reading for each protocol of `spec`, for windows of its largest length; `context_len` is L.

    Raises `ValueError` naming the key for a K beyond the shortest length, and for `streaming`, which reads no windows.
    """
    names = [protocol.value for protocol in spec.protocols]
    require(
        set(spec.protocols) <= set(READINGS),
        "evaluation.protocols",
        names,
        "streaming reads one long text and no windows; it is asked for by itself, of clex_train.cli.evaluate",
    )
    return [READINGS[protocol](spec, context_len) for protocol in dict.fromkeys(spec.protocols)]


def curve(
    nll: np.ndarray, spans: Sequence[Span], scored: np.ndarray, most_bins: int
) -> tuple[tuple[int, float, int], ...]:
    """(position, mean nll, tokens) of at most `most_bins` equal bins of the positions in a span; () for no bins.

    `nll` [windows, W] in nats, NaN or infinite where it is so. A bin without scored tokens is left out; its position is
    its middle, rounded down.
    """
    if not most_bins:
        return ()
    width = -(-(spans[0].stop - spans[0].start) // most_bins)
    positions = np.zeros(len(scored), dtype=np.int64)
    for span in spans:
        positions[span.first : span.stop] = np.arange(span.first, span.stop) - span.start
    bins = positions[scored] // width
    sums = np.bincount(bins, weights=nll[:, scored].sum(axis=0, dtype=np.float64))
    counts = np.bincount(bins) * len(nll)
    return tuple(
        (int(b) * width + width // 2, float(sums[b] / counts[b]), int(counts[b])) for b in np.flatnonzero(counts)
    )


def _one_shot(spec: EvaluationConfig, context_len: int) -> Reading:
    spans = _pieces(spec)
    return Reading(Protocol.one_shot, one_shot, spans, _given_at_every_length(spans))


def _per_position(spec: EvaluationConfig, context_len: int) -> Reading:
    """As LM-Infinite (2308.16137, figure 4) draws it: the nll of one reading against the position."""
    return replace(_one_shot(spec, context_len), protocol=Protocol.per_position, most_bins=MOST_BINS)


def _chunked(spec: EvaluationConfig, context_len: int) -> Reading:
    """The official code leaves out the first token of every L, although it has context."""
    spans = _pieces(spec)
    scored = _given_at_every_length(spans)
    for span in _all(spans):
        scored[span.start : span.stop : context_len] = False
    return Reading(Protocol.chunked, chunked, spans, scored)


def _sliding(spec: EvaluationConfig, context_len: int) -> Reading:
    longest = max(spec.lengths)
    spans = {
        # The last span ends where the window ends, so that none is shorter than N.
        n: _spans([*range(0, longest - n, spec.stride), longest - n], n)
        for n in sorted(spec.lengths)
    }
    return Reading(Protocol.sliding, one_shot, spans, _given_at_every_length(spans))


def _last_k(spec: EvaluationConfig, context_len: int) -> Reading:
    last_k, shortest, longest = spec.last_k or context_len, min(spec.lengths), max(spec.lengths)
    require(
        last_k <= shortest,
        "evaluation.last_k",
        last_k,
        f"more than the shortest of evaluation.lengths={spec.lengths}; say evaluation.last_k={shortest} or less",
    )
    spans = {n: _spans([longest - n], n) for n in sorted(spec.lengths)}
    scored = _given_at_every_length(spans)
    scored[: longest - last_k] = False
    return Reading(Protocol.last_k, one_shot, spans, scored)


READINGS: dict[Protocol, Callable[[EvaluationConfig, int], Reading]] = {
    Protocol.one_shot: _one_shot,
    Protocol.chunked: _chunked,
    Protocol.sliding: _sliding,
    Protocol.per_position: _per_position,
    Protocol.last_k: _last_k,
}


def _pieces(spec: EvaluationConfig) -> dict[int, tuple[Span, ...]]:
    return {n: _spans(range(0, max(spec.lengths), n), n) for n in sorted(spec.lengths)}


def _spans(starts: Sequence[int], length: int) -> tuple[Span, ...]:
    """Spans of `length` tokens at ascending `starts`; each gives what the one before it did not reach."""
    stops = [0, *(start + length for start in starts)]
    return tuple(
        Span(start, max(start + 1, before), stop) for start, (before, stop) in zip(starts, pairwise(stops), strict=True)
    )


def _all(spans: Mapping[int, Sequence[Span]]) -> Iterable[Span]:
    return (span for of_length in spans.values() for span in of_length)


def _given_at_every_length(spans: Mapping[int, Sequence[Span]]) -> np.ndarray:
    """bool [W]: the tokens that have a nll at every length."""
    longest = max(span.stop for span in _all(spans))
    common = np.ones(longest, dtype=bool)
    for of_length in spans.values():
        given = np.zeros(longest, dtype=bool)
        for span in of_length:
            given[span.first : span.stop] = True
        common &= given
    return common
