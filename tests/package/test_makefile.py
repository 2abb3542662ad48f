"""Test targets of the Makefile, which must name existing tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("lane", ["FAST", "OLDEST"])
def test_a_lane_names_tests_that_exist(lane: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (named,) = re.findall(rf"^{lane} := (.*)$", text, re.MULTILINE)
    assert len(named.split()) > 10
    assert [name for name in named.split() if not (ROOT / name).exists()] == []
