"""Mixtures of domains: shares over any thousand rows, the order within each domain, and O(1) lookup."""

import time
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.mixture import MixedRows, Schedule
from clex_train.data.sampler import ShuffledRows, SkippedRows
from tests.data.test_sampler import Numbers

RECIPE = {"book": 40, "arxiv": 20, "general": 20, "code": 10, "qa": 5, "paper": 5}
OTHER = {"book": 5, "arxiv": 25, "general": 0, "code": 55, "qa": 5, "paper": 10}
NAMES = list(RECIPE)


def one_hot(schedule: Schedule, start: int, stop: int) -> np.ndarray:
    """Return int [stop - start, K], 1 where a row belongs to a domain."""
    chosen = np.array([NAMES.index(schedule(row)[0]) for row in range(start, stop)])
    return np.eye(len(NAMES), dtype=int)[chosen]


def shares(weights: dict[str, float]) -> np.ndarray:
    return np.array([weights[name] for name in NAMES]) / sum(weights.values())


@pytest.mark.parametrize("start", [0, 123_456_789, 10**12])
def test_shares_are_within_half_a_percent_over_any_thousand_rows(start: int) -> None:
    total = np.cumsum(one_hot(Schedule({0: RECIPE}), start, start + 6000), axis=0)
    windows = (total[1000:] - total[:-1000]) / 1000
    assert np.abs(windows - shares(RECIPE)).max() <= 0.005


def test_shares_follow_the_weights_before_and_after_a_change() -> None:
    change = 2500
    rows = one_hot(Schedule({0: RECIPE, change: OTHER}), 0, 5000)
    wanted = np.cumsum(np.where(np.arange(5000)[:, None] < change, shares(RECIPE), shares(OTHER)), axis=0)
    total = np.cumsum(rows, axis=0)
    error = (total[1000:] - total[:-1000]) - (wanted[1000:] - wanted[:-1000])
    assert np.abs(error).max() <= 5, "rows of 1,000, in windows before, across and after the change"


@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.integers(0, 100), st.floats(0, 1)), min_size=1, max_size=20).filter(any),
    st.integers(0, 10**9),
)
def test_the_error_of_shares_is_bounded_by_the_depth_of_the_tree(weights: list[float], start: int) -> None:
    named = {f"d{n}": weight for n, weight in enumerate(weights)}
    schedule = Schedule({0: named})
    before, after = schedule.counts(start), schedule.counts(start + 1000)
    depth = ceil(log2(max(2, sum(weight > 0 for weight in weights))))
    for name, weight in named.items():
        assert abs(after[name] - before[name] - 1000 * weight / sum(weights)) <= depth


def test_each_domain_is_read_in_order_through_all_changes_of_weights() -> None:
    schedule = Schedule({0: RECIPE, 700: OTHER, 701: RECIPE, 1500: {**OTHER, "general": 90}})
    seen = dict.fromkeys(NAMES, 0)
    for row in range(3000):
        assert schedule.counts(row) == seen
        domain, position = schedule(row)
        assert position == seen[domain]
        seen[domain] += 1


def test_a_domain_with_weight_zero_is_not_read() -> None:
    schedule = Schedule({0: OTHER})
    assert all(schedule(row)[0] != "general" for row in range(500))
    assert Schedule({0: {"only": 3, "none": 0}})(7) == ("only", 7)


def test_a_row_of_a_mixture_is_the_next_row_of_its_domain() -> None:
    domains = {name: ShuffledRows(Numbers(100 + n), 3, name) for n, name in enumerate(NAMES)}
    mixed = MixedRows(domains, Schedule({0: RECIPE, 40: OTHER}))
    for row in (0, 1, 39, 40, 41, 999):
        domain, position = mixed.schedule(row)
        assert mixed[row].tokens.tolist() == domains[domain][position].tokens.tolist()
        assert mixed[row].index == row


def test_late_rows_cost_no_more_than_early_ones() -> None:
    schedule = Schedule({0: RECIPE, 10**9: OTHER})
    start = time.process_time()
    for row in range(10**12, 10**12 + 5000):
        schedule(row)
    assert time.process_time() - start < 2


@settings(max_examples=60)
@given(st.sets(st.integers(0, 200), max_size=90))
def test_skipping_keeps_the_other_rows_and_their_indices(skipped: set[int]) -> None:
    ranges = [(n, n + 1) for n in sorted(skipped)]
    rows = SkippedRows(Numbers(10_000), ranges)
    kept = [n for n in range(400) if n not in skipped]
    assert [rows[i].index for i in range(200)] == kept[:200]


def test_skipping_a_whole_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.skip_rows=\['0-4', '7-11'\]: skips 10 rows, but one pass .* has 10"):
        SkippedRows(Numbers(10), [(0, 5), (7, 12)])
