"""Scoring of answers, as in the code of the tasks' authors."""

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
def test_the_first_number_must_match_completely(generation: str, score: float) -> None:
    assert first_number(generation, ("12345",)) == score


def test_each_expected_string_counts_anywhere_in_the_answer() -> None:
    answers = ("apple", "Pear", "fig", "plum")
    assert share_contained("PEAR, and apples", answers) == 0.5
    assert share_contained("fig pear plum apple", answers) == 1
    assert share_contained("", answers) == 0
