"""Standard errors of perplexity by a bootstrap over documents (Efron and Tibshirani 1993, chapter 6).

    mean nll of a resample = sum of nll over its documents / sum of scored tokens over its documents

A resample draws D documents with replacement. With D documents the plug-in error is sqrt((D - 1) / D) of the unbiased
one. Shapes: `W` windows, `D` documents, `R` resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clex_train.utils.seeding import generator

NUM_RESAMPLES = 1000


class StandardErrors(NamedTuple):
    """Standard errors of the mean nll (nats per token) and of the perplexity; None with the reason in `note`."""

    mean_nll: float | None
    perplexity: float | None
    note: str = ""


class Difference(NamedTuple):
    """Difference of two methods' mean nll in nats per token, and its standard error; None with the reason in `note`."""

    mean_nll: float
    standard_error: float | None
    note: str = ""


def standard_errors(
    window_nll: Sequence[float],
    window_tokens: Sequence[int],
    documents: Sequence[int],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> StandardErrors:
    """Estimate the standard errors of sum(window_nll) / sum(window_tokens) and of its exponential.

    Args:
        window_nll: [W] summed nll of each window's scored tokens, in nats.
        window_tokens: [W] scored tokens of each window.
        documents: [W] index of each window's document; empty for a stream.
        num_resamples: R.
        seed: equal seeds give equal resamples.
    """
    note = _obstacle(window_nll, documents)
    if note:
        return StandardErrors(None, None, note)
    means = _resampled_means(window_nll, window_tokens, documents, num_resamples, seed)
    if means.max() > 700:  # exp overflows float64 at 709
        return StandardErrors(_spread(means), None, "the perplexity of a resample overflows")
    return StandardErrors(_spread(means), _spread(np.exp(means)))


def paired_difference(
    window_nll: Sequence[float],
    other_nll: Sequence[float],
    window_tokens: Sequence[int],
    documents: Sequence[int],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Subtract the mean nll of the other method [W] from the first [W] over the same tokens, with a standard error."""
    # Resampling the differences cancels what both methods find hard in a document, so this error is often far below
    # that of either method.
    differences = np.asarray(window_nll, dtype=np.float64) - np.asarray(other_nll, dtype=np.float64)
    mean = float(differences.sum() / np.sum(window_tokens))
    note = _obstacle(differences, documents)
    if note:
        return Difference(mean, None, note)
    means = _resampled_means(differences, window_tokens, documents, num_resamples, seed)
    return Difference(mean, _spread(means))


def _obstacle(window_nll: Sequence[float] | np.ndarray, documents: Sequence[int]) -> str:
    """Return the reason why there is no standard error, or an empty string."""
    if not len(documents):
        return "the text is one stream, not documents"
    if len(set(documents)) == 1:
        return "all windows are from one document"
    return "" if np.isfinite(window_nll).all() else "the nll is not finite"


def _resampled_means(
    window_nll: Sequence[float] | np.ndarray,
    window_tokens: Sequence[int],
    documents: Sequence[int],
    num_resamples: int,
    seed: int,
) -> np.ndarray:
    """Compute the mean nll of every resample, float64 [R]."""
    # Tokens of a document are not independent, so whole documents are drawn.
    _, index = np.unique(np.asarray(documents), return_inverse=True)
    nll = np.bincount(index, weights=np.asarray(window_nll, dtype=np.float64))
    tokens = np.bincount(index, weights=np.asarray(window_tokens, dtype=np.float64))
    # D draws with replacement, as counts: a matrix product [R, D] x [D] replaces R gathers.
    chances = np.full(len(nll), 1 / len(nll))
    times = generator(seed, "evaluation_bootstrap").multinomial(len(nll), chances, num_resamples)
    drawn = times @ tokens
    # A resample of documents without a scored token has no mean; key tokens may be that rare.
    return np.asarray((times @ nll)[drawn > 0] / drawn[drawn > 0])


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1))
