"""Bootstrap standard errors over documents: against a plain loop, against theory, and undefined cases."""

import math

import numpy as np
import pytest

from clex_train.evaluation.results import Score, compare, with_standard_errors
from clex_train.utils.bootstrap import paired_difference, standard_errors


def sample(num_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample documents of one to three windows, each document with its own difficulty."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(num_documents) * 7, rng.integers(1, 4, num_documents))
    level = rng.normal(3, 0.5, 7 * num_documents)
    tokens = rng.integers(50, 200, len(documents))
    return level[documents] * tokens + rng.normal(0, 2, len(documents)), tokens, documents


def test_resamples_match_a_plain_loop_over_documents() -> None:
    nll, tokens, documents = sample(9)
    draws = np.random.default_rng(1)
    means = []
    for _ in range(20_000):
        chosen = draws.choice(np.unique(documents), 9)
        rows = np.concatenate([np.flatnonzero(documents == document) for document in chosen])
        means.append(nll[rows].sum() / tokens[rows].sum())
    errors = standard_errors(nll, tokens, documents, num_resamples=20_000)
    assert errors.mean_nll == pytest.approx(np.std(means, ddof=1), rel=0.03)
    assert errors.perplexity == pytest.approx(np.std(np.exp(means), ddof=1), rel=0.03)
    assert errors.note == ""


def test_equal_documents_have_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(3, 0.2, 200)
    errors = standard_errors(100 * values, [100] * 200, range(200), num_resamples=20_000)
    expected = values.std(ddof=1) / math.sqrt(200)
    assert errors.mean_nll == pytest.approx(expected, rel=0.03)
    assert errors.perplexity == pytest.approx(math.exp(values.mean()) * expected, rel=0.03)


def test_windows_of_one_document_are_not_treated_as_independent() -> None:
    level = np.random.default_rng(4).normal(3, 0.5, 20)
    documents = np.repeat(np.arange(20), 10)
    together = standard_errors(100 * level[documents], [100] * 200, documents)
    apart = standard_errors(100 * level[documents], [100] * 200, np.arange(200))
    assert together.mean_nll is not None
    assert apart.mean_nll is not None
    assert together.mean_nll > 2.5 * apart.mean_nll


def test_equal_arguments_give_equal_errors_and_the_order_of_windows_does_not_matter() -> None:
    nll, tokens, documents = sample(12)
    first = standard_errors(nll, tokens, documents)
    assert first == standard_errors(nll, tokens, documents)
    shuffled = np.random.default_rng(0).permutation(len(nll))
    assert standard_errors(nll[shuffled], tokens[shuffled], documents[shuffled]) == pytest.approx((*first[:2], ""))
    assert first != standard_errors(nll, tokens, documents, seed=1)


def test_a_paired_difference_cancels_shared_difficulty() -> None:
    nll, tokens, documents = sample(30)
    better = nll - 0.01 * tokens
    exact = paired_difference(nll, better, tokens, documents)
    assert exact.mean_nll == pytest.approx(0.01)
    assert exact.standard_error == pytest.approx(0, abs=1e-12)
    noisy = paired_difference(nll, better + np.random.default_rng(5).normal(0, 1, len(nll)), tokens, documents)
    alone = standard_errors(nll, tokens, documents).mean_nll
    assert noisy.standard_error is not None
    assert alone is not None
    assert 0 < noisy.standard_error < alone / 5
    reverse = paired_difference(better, nll, tokens, documents)
    assert reverse.mean_nll == pytest.approx(-exact.mean_nll)


def test_a_paired_difference_uses_the_resamples_of_either_method() -> None:
    """Pair with a perfect second method, so that the difference is the first method itself."""
    nll, tokens, documents = sample(10)
    paired = paired_difference(nll, np.zeros(len(nll)), tokens, documents)
    assert paired.standard_error == standard_errors(nll, tokens, documents).mean_nll


@pytest.mark.parametrize(
    ("nll", "documents", "note"),
    [
        ([10.0, 12.0], [4, 4], "all windows are from one document"),
        ([10.0], [4], "all windows are from one document"),
        ([10.0, math.nan], [4, 5], "the nll is not finite"),
        ([10.0, 12.0], [], "the text is one stream, not documents"),
    ],
)
def test_a_missing_standard_error_has_a_reason(nll: list[float], documents: list[int], note: str) -> None:
    assert standard_errors(nll, [5] * len(nll), documents) == (None, None, note)
    difference = paired_difference(nll, [1.0] * len(nll), [5] * len(nll), documents)
    assert (difference.standard_error, difference.note) == (None, note)


def test_an_overflowing_perplexity_has_a_standard_error_of_its_logarithm_only() -> None:
    errors = standard_errors([8e4, 8.1e4], [100, 100], [1, 2])
    assert errors.perplexity is None
    assert errors.mean_nll is not None
    assert errors.mean_nll > 0
    assert errors.note == "the perplexity of a resample overflows"


def score(nll: list[float], fingerprint: str = "f") -> Score:
    return Score("none", "one_shot", 64, "none", 1.0, nll, 30, 0.1, fingerprint)


def test_scores_have_standard_errors_and_compare_only_over_equal_tokens() -> None:
    documents = [1, 1, 2]
    with_errors = with_standard_errors(score([30.0, 31.0, 42.0]), documents)
    assert with_errors.mean_nll_standard_error == standard_errors([30.0, 31.0, 42.0], [10] * 3, documents).mean_nll
    difference = compare(score([30.0, 31.0, 42.0]), score([29.0, 31.0, 42.0]), documents)
    assert difference.mean_nll == pytest.approx(1 / 30)
    with pytest.raises(ValueError, match=r"perplexity/none/one_shot/64 .*scored different tokens"):
        compare(score([30.0, 31.0, 42.0]), score([29.0, 31.0, 42.0], "g"), documents)
