"""What a program prints reaches every terminal, and a fault of ours in writing text is not called the user's."""

import io
import sys

import pytest

from clex_train.console import program
from clex_train.console.errors import explain


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_table_is_printed_whatever_the_terminal_takes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert program.run(lambda: program.say("37.05 ±0.12 \u2026 橋 caf\udce9.txt"), lambda: "") == 0
    written = output.buffer.getvalue().decode(encoding)
    assert (
        written
        == {
            "ascii": "37.05 ~0.12 ~ \\u6a4b caf\\udce9.txt\n",
            "latin-1": "37.05 ±0.12 ~ \\u6a4b caf\\udce9.txt\n",
            "utf-8": "37.05 ±0.12 \u2026 橋 caf\\udce9.txt\n",
        }[encoding]
    )


def test_text_that_we_cannot_write_is_no_mistake_of_the_user() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        # In this file as in the program's own: what is raised here is "ours".
        "caf\udce9".encode()
    assert explain(caught.value) is None
