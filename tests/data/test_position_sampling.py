"""Sampling of t and of positions: properties for every row length, scale factor and seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.position_sampling import (
    draw_batch,
    draw_document_batch,
    draw_document_positions,
    draw_positions,
    draw_t,
)
from clex_train.utils.seeding import generator

KINDS = ("random", "uniform", "skip", "mix")
SEEDS = st.integers(0, 2**31)
SCALES = st.one_of(st.floats(1, 64), st.integers(1, 64).map(float), st.just(1.0))


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int]:
    """Draw (n, L): shorter than L, equal, odd multiples, and at least 3 L, where the official formula repeats."""
    context_len = draw(st.integers(1, 96))
    num_tokens = draw(
        st.one_of(
            st.integers(1, context_len),
            st.just(context_len),
            st.integers(context_len, 3 * context_len),
            st.integers(3 * context_len, 5 * context_len + 1),
        )
    )
    return num_tokens, context_len


def draw(kind: str, num_tokens: int, context_len: int, t: float, seed: int, **options: float) -> np.ndarray:
    return draw_positions(kind, num_tokens, context_len, t, generator(seed, "test"), **options).numpy()


@settings(max_examples=150)
@given(st.sampled_from(KINDS), rows(), SCALES, SEEDS)
def test_positions_start_at_0_rise_strictly_and_stay_below_t_times_l(
    kind: str, row: tuple[int, int], t: float, seed: int
) -> None:
    num_tokens, context_len = row
    positions = draw(kind, num_tokens, context_len, t, seed)
    assert positions.shape == (num_tokens,)
    assert positions.dtype == np.float64
    assert positions[0] == 0
    assert (np.diff(positions) > 0).all()
    assert positions[-1] < t * context_len


@settings(max_examples=100)
@given(st.sampled_from(("random", "uniform")), rows(), SCALES, SEEDS)
def test_random_and_uniform_positions_are_on_the_grid(kind: str, row: tuple[int, int], t: float, seed: int) -> None:
    num_tokens, context_len = row
    positions = draw(kind, num_tokens, context_len, t, seed)
    index = np.round(positions * num_tokens / context_len)
    assert np.array_equal(positions, index * context_len / num_tokens)
    assert index[-1] <= math.floor(num_tokens * t) - 1


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.integers(1, 200), SCALES, SEEDS)
def test_rows_of_the_trained_length_have_integer_positions(kind: str, context_len: int, t: float, seed: int) -> None:
    positions = draw(kind, context_len, context_len, t, seed)
    assert np.array_equal(positions, np.round(positions))


@settings(max_examples=100)
@given(st.sampled_from(KINDS), rows(), SEEDS)
def test_t_1_gives_the_plain_grid(kind: str, row: tuple[int, int], seed: int) -> None:
    num_tokens, context_len = row
    if kind in ("skip", "mix") and num_tokens < context_len:
        return  # A short row of chunks keeps its neighbours 1 apart and has room to skip even inside L.
    expected = np.arange(num_tokens) * context_len / num_tokens
    np.testing.assert_allclose(draw(kind, num_tokens, context_len, 1.0, seed), expected, rtol=1e-15, atol=0)


@settings(max_examples=100)
@given(rows(), SCALES, SEEDS)
def test_random_ends_at_the_largest_grid_point(row: tuple[int, int], t: float, seed: int) -> None:
    num_tokens, context_len = row
    positions = draw("random", num_tokens, context_len, t, seed)
    if num_tokens > 1:
        assert positions[-1] == (math.floor(num_tokens * t) - 1) * context_len / num_tokens


@settings(max_examples=100)
@given(rows(), SCALES, SEEDS)
def test_uniform_is_evenly_spaced_to_within_one_grid_step(row: tuple[int, int], t: float, seed: int) -> None:
    num_tokens, context_len = row
    positions = draw("uniform", num_tokens, context_len, t, seed)
    even = np.arange(num_tokens) * t * context_len / num_tokens
    assert (np.abs(positions - even) <= context_len / num_tokens * (1 + 1e-9)).all()


@settings(max_examples=150)
@given(rows(), SCALES, SEEDS, st.integers(2, 8))
def test_skip_has_few_chunks_and_integer_gaps(row: tuple[int, int], t: float, seed: int, max_chunks: int) -> None:
    num_tokens, context_len = row
    positions = draw("skip", num_tokens, context_len, t, seed, max_chunks=max_chunks)
    spacing = min(1.0, t * context_len / num_tokens)
    gaps = np.diff(positions) - spacing
    jumps = gaps > 1e-6
    assert jumps.sum() <= max_chunks - 1
    np.testing.assert_allclose(gaps[~jumps], 0, atol=1e-9)
    np.testing.assert_allclose(gaps[jumps], np.round(gaps[jumps]), atol=1e-9)


def test_skip_reaches_the_whole_range_and_every_number_of_chunks() -> None:
    drawn = [draw("skip", 64, 64, 16.0, seed) for seed in range(400)]
    chunks = {int((np.diff(p) > 1).sum()) + 1 for p in drawn}
    assert set(range(2, 9)) <= chunks
    assert max(p[-1] for p in drawn) > 0.98 * 16 * 64
    assert min(p[-1] for p in drawn) < 0.2 * 16 * 64


def test_random_draws_every_grid_point_equally_often() -> None:
    counts = np.zeros(32)
    for seed in range(3000):
        counts[draw("random", 8, 8, 4.0, seed).astype(int)] += 1
    assert counts[0] == counts[31] == 3000
    # 6 of the 30 points between the ends: 600 expected, with a binomial standard deviation of 22.
    assert (np.abs(counts[1:31] - 600) < 5 * 22).all()


def test_mix_uses_random_with_the_given_probability_per_row() -> None:
    rows = [draw("mix", 256, 256, 16.0, seed, mix_random=0.25) for seed in range(1000)]
    share = np.mean([(np.diff(row) == 1).mean() < 0.5 for row in rows])
    assert 0.25 - 4 * 0.0137 < share < 0.25 + 4 * 0.0137


@pytest.mark.parametrize(("mix_random", "alone"), [(0.0, False), (1.0, True)])
def test_mix_at_its_ends_is_one_kind(mix_random: float, alone: bool) -> None:
    positions = draw("mix", 256, 256, 16.0, 3, mix_random=mix_random)
    assert bool((np.diff(positions) == 1).mean() < 0.5) is alone


def test_a_row_depends_on_its_global_index_and_not_on_its_batch() -> None:
    options = {"seq_len": 48, "context_len": 32, "t": 3.3, "seed": 7}
    together = draw_batch("mix", [4, 5, 6, 7], **options)
    apart = torch.cat([draw_batch("mix", [6, 7], **options), draw_batch("mix", [4, 5], **options)])
    assert together.shape == (4, 48)
    assert together.dtype == torch.float64
    assert torch.equal(together, apart[[2, 3, 0, 1]])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw_batch("mix", [4, 5, 6, 7], **{**options, "seed": 8}))


def test_t_is_continuous_uniform_and_a_function_of_seed_and_step() -> None:
    draws = np.array([draw_t(0, step, 16.0) for step in range(4000)])
    assert draw_t(0, 17, 16.0) == draws[17] != draw_t(1, 17, 16.0)
    assert draws.min() >= 1
    assert draws.max() < 16
    assert len(set(draws)) == 4000
    # Kolmogorov-Smirnov distance from U[1, 16]; 1.95 / sqrt(n) is exceeded once in a thousand seeds.
    distance = np.abs(np.sort(draws) - (1 + 15 * (np.arange(4000) + 0.5) / 4000)).max() / 15
    assert distance < 1.95 / math.sqrt(4000)


def test_log_uniform_t_gives_each_doubling_equal_weight_and_the_same_on_every_call() -> None:
    draws = np.array([draw_t(0, step, 16.0, "log_uniform") for step in range(4000)])
    assert draw_t(0, 17, 16.0, "log_uniform") == draws[17] != draw_t(1, 17, 16.0, "log_uniform")
    assert draws.min() >= 1
    assert draws.max() < 16
    # Kolmogorov-Smirnov distance of log2 t from U[0, 4], as for the uniform draws.
    distance = np.abs(np.sort(np.log2(draws)) - 4 * (np.arange(4000) + 0.5) / 4000).max() / 4
    assert distance < 1.95 / math.sqrt(4000)


@settings(max_examples=50)
@given(st.floats(1, 64), SEEDS)
def test_log_uniform_t_is_at_most_uniform_t_and_both_are_in_range(t_max: float, seed: int) -> None:
    uniform, logarithmic = (draw_t(seed, 3, t_max, name) for name in ("uniform", "log_uniform"))
    assert 1 <= logarithmic <= uniform <= t_max


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_t_max_1_draws_1(distribution: str) -> None:
    assert draw_t(0, 0, 1.0, distribution) == 1.0


def test_plain_counts_the_tokens_of_a_row_and_of_each_document() -> None:
    assert draw("plain", 5, 3, 4.0, 0).tolist() == [0, 1, 2, 3, 4]
    documents = draw_document_batch("plain", [7], [[2, 3]], context_len=8, t=2.0, seed=0)
    assert documents.tolist() == [[0, 1, 0, 1, 2]]


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 96), SCALES, SEEDS)
def test_each_document_of_a_row_restarts_and_spans_its_share(
    kind: str, lengths: list[int], context_len: int, t: float, seed: int
) -> None:
    generators = [generator(seed, "test", document) for document in range(len(lengths))]
    positions = draw_document_positions(kind, lengths, context_len, t, generators).numpy()
    assert len(positions) == sum(lengths)
    for document in np.split(positions, np.cumsum(lengths)[:-1]):
        assert document[0] == 0
        assert (np.diff(document) > 0).all()
        assert document[-1] < len(document) * t * context_len / sum(lengths) * (1 + 1e-12)


def test_one_document_draws_like_a_whole_row() -> None:
    row, document = (draw_positions("random", 64, 48, 5.5, generator(0, "x")) for _ in range(2))
    documents = draw_document_positions("random", [64], 48, 5.5, [generator(0, "x")])
    assert torch.equal(row, document)
    assert torch.equal(row, documents)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_batch_depend_only_on_row_and_number(kind: str) -> None:
    how: dict[str, object] = {"context_len": 24, "t": 3.5, "seed": 7}
    lengths = [[1, 9, 14], [24], [10, 13, 1]]
    batch = draw_document_batch(kind, [5, 6, 9], lengths, **how)
    assert batch.shape == (3, 24)
    alone = torch.cat(
        [draw_document_batch(kind, [row], [of], **how) for row, of in zip([5, 6, 9], lengths, strict=True)]
    )
    assert torch.equal(batch, alone), "other rows of the micro-batch change nothing"
    # Documents with the same length and number in a row draw the same positions, whatever precedes them.
    swapped = draw_document_batch(kind, [5], [[9, 1, 14]], **how)
    assert torch.equal(batch[0, 10:], swapped[0, 10:])
    if kind == "random":
        assert not torch.equal(batch, draw_document_batch(kind, [15, 16, 19], lengths, **how))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "poisson"}, "positions=poisson: one of random, uniform, skip, mix"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"context_len": 0}, "context_len=0"),
        ({"t": 0.5}, r"t=0\.5"),
        ({"t": float("nan")}, "t=nan"),
        ({"mix_random": 1.5}, r"mix_random=1\.5"),
        ({"max_chunks": 1}, "max_chunks=1"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "kind": "mix",
        "num_tokens": 8,
        "context_len": 8,
        "t": 2.0,
        "rng": generator(0, "x"),
    }
    with pytest.raises(ValueError, match=message):
        draw_positions(**{**arguments, **change})
