"""Standard errors by a bootstrap over documents: how far the numbers would move on other documents of the same kind.

    mean nll of a resample = sum of nll over its documents / sum of scored tokens over its documents

Tokens of one document are not independent, so documents are what is drawn, with replacement and as many as there are
(Efron and Tibshirani 1993, chapter 6). Equal arguments give equal draws, so two methods over the same documents are
compared on the same resamples. With D documents the plug-in error is sqrt((D - 1) / D) of the unbiased one.
Shapes: `W` windows, `D` documents, `R` resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clex_train.utils.seeding import generator

NUM_RESAMPLES = 1000


class StandardErrors(NamedTuple):
    """Of the mean nll (nats per token) and of its exponential; None with the reason in `note`."""

    mean_nll: float | None
    perplexity: float | None
    note: str = ""


class Difference(NamedTuple):
    """Mean nll of one method less that of another in nats per token, with its standard error or the reason for none."""

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
    """Standard errors of sum(window_nll) / sum(window_tokens) and its exponential.

    `window_nll` [W] is the summed nll of each window's `window_tokens` [W] scored tokens, `documents` [W] the document
    that each window is from.
    """
    note = _obstacle(window_nll, documents)
    if note:
        return StandardErrors(None, None, note)
    means = _resampled_means(window_nll, window_tokens, documents, num_resamples, seed)
    if means.max() > 700:
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
    """Mean nll of the first [W] less that of the other [W] over the same tokens, with the error of the difference.

    What both methods find hard in a document cancels, so this error is often far below those of either.
    """
    differences = np.asarray(window_nll, dtype=np.float64) - np.asarray(other_nll, dtype=np.float64)
    mean = float(differences.sum() / np.sum(window_tokens))
    note = _obstacle(differences, documents)
    if note:
        return Difference(mean, None, note)
    means = _resampled_means(differences, window_tokens, documents, num_resamples, seed)
    return Difference(mean, _spread(means))


def _obstacle(window_nll: Sequence[float] | np.ndarray, documents: Sequence[int]) -> str:
    """Why there is no standard error; empty when there is one."""
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
    """float64 [R]: the mean nll of every resample."""
    _, index = np.unique(np.asarray(documents), return_inverse=True)
    nll = np.bincount(index, weights=np.asarray(window_nll, dtype=np.float64))
    tokens = np.bincount(index, weights=np.asarray(window_tokens, dtype=np.float64))
    # How often each document is in a resample: D draws with replacement, counted.
    chances = np.full(len(nll), 1 / len(nll))
    times = generator(seed, "evaluation_bootstrap").multinomial(len(nll), chances, num_resamples)
    return np.asarray((times @ nll) / (times @ tokens))


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1))
