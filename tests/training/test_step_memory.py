"""The memory estimate of `dry_run` against the resident set of a real step, and the savings by tiling."""

from pathlib import Path

import pytest
from bench_memory import CASES, TILED, WHOLE, measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="needs the resident set from /proc"),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in (WHOLE, TILED)])
def test_the_estimate_is_within_a_tenth_of_the_resident_set(name: str) -> None:
    found = measure(BY_NAME[name])
    assert 0.9 < found.ratio < 1.1, found


def test_tiling_reduces_the_memory_of_a_16k_row_to_at_most_a_third() -> None:
    whole, tiled = (measure(BY_NAME[name]) for name in (WHOLE, TILED))
    assert tiled.grown <= whole.grown / 3, (whole, tiled)
    assert tiled.loss == pytest.approx(whole.loss, rel=1e-6)
    for found in (whole, tiled):
        assert 0.9 < found.ratio < 1.1, found
