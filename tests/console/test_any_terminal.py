"""Console output on terminals of any encoding; our own encoding errors are not reported as the user's."""

import io
import sys

import pytest

from clex_train.console import program
from clex_train.console.errors import explain


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_table_is_printed_in_every_terminal_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert program.run(lambda: program.echo("37.05 ±0.12 \u2026 橋 caf\udce9.txt"), lambda: "") == 0
    written = output.buffer.getvalue().decode(encoding)
    assert (
        written
        == {
            "ascii": "37.05 ~0.12 ~ \\u6a4b caf\\udce9.txt\n",
            "latin-1": "37.05 ±0.12 ~ \\u6a4b caf\\udce9.txt\n",
            "utf-8": "37.05 ±0.12 \u2026 橋 caf\\udce9.txt\n",
        }[encoding]
    )


def test_an_encoding_error_of_ours_is_not_a_user_mistake() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        # Errors raised in this file count as ours, like those raised in the program.
        "caf\udce9".encode()
    assert explain(caught.value) is None
