"""Answers are judged as the tasks' authors do."""

import pytest

from clex_train.retrieval.scoring import first_number, share_contained


@pytest.mark.parametrize(
    ("generation", "score"),
    [
        (" 12345", 1),
        (": 12345. Remember", 1),
        ("12345\n67890", 1),
        (" 123456", 0),
        (" 1234", 0),
        ("67890, not 12345", 0),
        ("", 0),
        (" unknown", 0),
    ],
)
def test_the_first_number_counts_whole(generation: str, score: float) -> None:
    assert first_number(generation, ("12345",)) == score


def test_each_expected_string_counts_wherever_it_stands() -> None:
    answers = ("apple", "Pear", "fig", "plum")
    assert share_contained("PEAR, and apples", answers) == 0.5
    assert share_contained("fig pear plum apple", answers) == 1
    assert share_contained("", answers) == 0
