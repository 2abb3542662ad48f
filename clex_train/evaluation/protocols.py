"""Perplexity protocols: which spans of a window are read at length N, by which function, and which tokens are scored.

    one_shot, per_position   [0, N), [N, 2N), ...         non-overlapping spans; per_position adds nll by position
    chunked                  the same spans               official CLEX: L tokens at a time through the cache, t grows
    sliding                  [0, N), [S, S + N), ...      stride S; YaRN (2309.00071, 4.3), LongLoRA (2309.12307, 4)
    last_k                   [W - N, W)                   the last K tokens of a window, with more and more context
    long_ppl                 as sliding                   only the key tokens of a file (LongPPL, 2410.23771)

A token takes its nll from the first span that contains it after the span's first token, which has no context (or is
BOS). Only tokens with a nll at every length are scored, so all columns of a protocol average the same tokens. Shapes:
`W` tokens of a window, the largest length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.evaluation import key_tokens
from clex_train.evaluation.perplexity import Predict, chunked, one_shot
from clex_train.utils.errors import require

if TYPE_CHECKING:
    from clex_train.evaluation.windows import WindowSet

MOST_BINS = 128
"""Maximum number of points of a curve of nll by position."""


class Span(NamedTuple):
    """Tokens [start, stop) of a window are read together; tokens [first, stop) take their nll from it."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """Spans, reading function and scored tokens of one protocol, the same for every window."""

    protocol: Protocol
    read: Predict
    spans: Mapping[int, tuple[Span, ...]]
    """Length to its spans, in ascending order."""
    scored: np.ndarray
    """bool [W], or [windows, W] where they differ between windows: the tokens that are scored, at every length."""
    most_bins: int = 0
    """Maximum points of the curve of nll by position; 0 for no curve."""
    keys: key_tokens.KeyTokens | None = None
    """The list that `scored` is made of, for `long_ppl`."""

    def window_nll(self, nll: np.ndarray) -> list[float]:
        """Sum the nll [windows, W] of each window's scored tokens."""
        if self.scored.ndim == 1:
            return list(map(float, nll[:, self.scored].sum(axis=1, dtype=np.float64)))
        # Not a product with the mask: an infinite nll of a token that is not scored would become NaN.
        return [float(row[scored].sum(dtype=np.float64)) for row, scored in zip(nll, self.scored, strict=True)]

    def window_tokens(self, num_windows: int) -> list[int]:
        """Count the scored tokens of each window."""
        each = np.broadcast_to(self.scored, (num_windows, self.scored.shape[-1])).sum(axis=1)
        return list(map(int, each))


def readings(spec: EvaluationConfig, context_len: int) -> list[Reading]:
    """Build a reading for each protocol of `spec`; windows have its largest length. `context_len` is L in tokens.

    Raises `ConfigError` for `last_k` above the shortest length, and for `streaming`, which reads no windows.
    """
    names = [protocol.value for protocol in spec.protocols]
    require(
        set(spec.protocols) <= set(READINGS),
        "evaluation.protocols",
        names,
        "streaming reads one long text and no windows; run it by itself, with clex_train.cli.evaluate",
    )
    return [READINGS[protocol](spec, context_len) for protocol in dict.fromkeys(spec.protocols)]


def curve(
    nll: np.ndarray, spans: Sequence[Span], scored: np.ndarray, most_bins: int
) -> tuple[tuple[int, float, int], ...]:
    """Average the nll by position in the span: (middle position, mean nll, tokens) of up to `most_bins` equal bins.

    `nll` [windows, W] in nats. Bins without scored tokens are left out.
    """
    if not most_bins:
        return ()
    width = -(-(spans[0].stop - spans[0].start) // most_bins)
    positions = np.zeros(len(scored), dtype=np.int64)
    for span in spans:
        positions[span.first : span.stop] = np.arange(span.first, span.stop) - span.start
    # Every window has the same scored positions, so one count serves all of them.
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
    """Add the curve of nll by position to `one_shot`, as in LM-Infinite (2308.16137, figure 4)."""
    return replace(_one_shot(spec, context_len), protocol=Protocol.per_position, most_bins=MOST_BINS)


def _chunked(spec: EvaluationConfig, context_len: int) -> Reading:
    """Read L tokens at a time, as the official CLEX evaluation does."""
    spans = _pieces(spec)
    scored = _given_at_every_length(spans)
    # The official code does not score the first token of every L, although it has context.
    for span in _all(spans):
        scored[span.start : span.stop : context_len] = False
    return Reading(Protocol.chunked, chunked, spans, scored)


def _sliding(spec: EvaluationConfig, context_len: int) -> Reading:
    longest = max(spec.lengths)
    spans = {
        # The last span ends where the window ends, so that none is shorter than N.
        n: spans_at([*range(0, longest - n, spec.stride), longest - n], n)
        for n in sorted(spec.lengths)
    }
    return Reading(Protocol.sliding, one_shot, spans, _given_at_every_length(spans))


def _last_k(spec: EvaluationConfig, context_len: int) -> Reading:
    last_k, shortest, longest = spec.last_k or context_len, min(spec.lengths), max(spec.lengths)
    require(
        last_k <= shortest,
        "evaluation.last_k",
        last_k,
        f"more than the shortest of evaluation.lengths={spec.lengths}; set evaluation.last_k={shortest} or less",
    )
    spans = {n: spans_at([longest - n], n) for n in sorted(spec.lengths)}
    scored = _given_at_every_length(spans)
    # With K = the shortest length, the first of the K tokens has no context there and stays unscored everywhere.
    scored[: longest - last_k] = False
    return Reading(Protocol.last_k, one_shot, spans, scored)


def _long_ppl(spec: EvaluationConfig, context_len: int) -> Reading:
    """Score the key tokens of a file, each with at least N - `stride` tokens of context (or all before it)."""
    path = str(spec.key_tokens)
    keys = key_tokens.read(Path(path))
    length, longest = keys.windows["length"], max(spec.lengths)
    remedy = f"made for windows of {length} tokens, and the longest of evaluation.lengths is {longest}"
    require(length == longest, "evaluation.key_tokens", path, remedy)
    # One-shot spans would leave key tokens near a span's beginning without the context that makes them key.
    reading = _sliding(spec, context_len)
    scored = keys.mask & reading.scored
    require(bool(scored.any()), "evaluation.key_tokens", path, "has no key token; lower alpha or beta in its making")
    return replace(reading, protocol=Protocol.long_ppl, scored=scored, keys=keys)


def require_key_tokens_fit(spec: EvaluationConfig, given: Iterable[Reading], windows: str, store: str) -> None:
    """Raise `ConfigError` for key tokens of other windows or another store, given by their fingerprints."""
    for reading in given:
        if reading.keys is not None:
            key_tokens.require_fit(reading.keys, str(spec.key_tokens), windows, store)


def scored_tokens(given: Iterable[Reading], length: int, windows: WindowSet) -> dict[tuple[str, int], str]:
    """Map (protocol, length) of each reading to the fingerprint of the tokens that it scores."""
    return {(each.protocol.value, length): windows.fingerprint(each.scored) for each in given}


READINGS: dict[Protocol, Callable[[EvaluationConfig, int], Reading]] = {
    Protocol.one_shot: _one_shot,
    Protocol.chunked: _chunked,
    Protocol.sliding: _sliding,
    Protocol.per_position: _per_position,
    Protocol.last_k: _last_k,
    Protocol.long_ppl: _long_ppl,
}


def _pieces(spec: EvaluationConfig) -> dict[int, tuple[Span, ...]]:
    return {n: spans_at(range(0, max(spec.lengths), n), n) for n in sorted(spec.lengths)}


def spans_at(starts: Sequence[int], length: int) -> tuple[Span, ...]:
    """Make spans of `length` tokens at ascending `starts`; each scores the tokens that the one before did not reach."""
    # The first token of a span has no context in it, hence at least start + 1.
    stops = [0, *(start + length for start in starts)]
    return tuple(
        Span(start, max(start + 1, before), stop) for start, (before, stop) in zip(starts, pairwise(stops), strict=True)
    )


def _all(spans: Mapping[int, Sequence[Span]]) -> Iterable[Span]:
    return (span for of_length in spans.values() for span in of_length)


def _given_at_every_length(spans: Mapping[int, Sequence[Span]]) -> np.ndarray:
    """Mark the tokens that have a nll at every length, bool [W]."""
    longest = max(span.stop for span in _all(spans))
    common = np.ones(longest, dtype=bool)
    # Different tokens at different lengths would confound the length with the text.
    for of_length in spans.values():
        given = np.zeros(longest, dtype=bool)
        for span in of_length:
            given[span.first : span.stop] = True
        common &= given
    return common
