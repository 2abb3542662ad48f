"""Suggestions for misspelt keys."""

import pytest

from clex_train.utils.suggestions import did_you_mean, in_words

KEYS = ["optim.lr", "optim.steps", "scaling.t_max", "scaling.lr_scale", "data.seq_len", "seed"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.t_max", "scaling.t_max"),
        ("t_max", "scaling.t_max"),
        ("evaluation.seq_len", "data.seq_len"),
        ("scalling.t_max", "scaling.t_max"),
        ("sed", "seed"),
    ],
)
def test_the_intended_key_is_suggested(wrong, right):
    assert did_you_mean(wrong, KEYS) == f"did you mean {right}?"


def test_nothing_near_gives_no_suggestion():
    assert did_you_mean("zzz.qqqqqq", KEYS) == ""


def test_names_are_joined_as_in_prose():
    assert in_words(["a"]) == "a"
    assert in_words(["a", "b", "c"]) == "a, b or c"
