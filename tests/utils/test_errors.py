"""One-line summaries of errors of other libraries."""

import pickle

import pytest

from clex_train.utils.errors import first_line

CASES = {
    "of one line": (ValueError("a"), "a"),
    "of several, with space around": (OSError("\n first \nsecond\n"), "first"),
    "without a message": (pickle.UnpicklingError(), "UnpicklingError"),
    "of blanks": (KeyboardInterrupt("  \n"), "KeyboardInterrupt"),
}


@pytest.mark.parametrize(("error", "line"), CASES.values(), ids=CASES)
def test_an_error_has_one_line(error, line):
    assert first_line(error) == line
