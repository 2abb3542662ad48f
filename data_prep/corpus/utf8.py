"""Long texts as UTF-8 bytes: a Python str takes four bytes per character as soon as one of them is an emoji."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.corpus.bad_record import BadRecord

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Utf8:
    """A text of a record that is not decoded yet, and may not be valid UTF-8."""

    content: bytes


def decode(content: bytes) -> str:
    """Decode UTF-8 strictly.

    Raises:
        BadRecord: names the line and the byte that are not UTF-8.
    """
    # One block: `blocks` adds the position of an invalid byte to the error.
    return "".join(blocks(content, len(content)))


def blocks(content: bytes, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """Yield the text in pieces of at most `block_bytes` of UTF-8 (at least one character each).

    Raises:
        BadRecord: while iterating; names the line and the byte that are not UTF-8.
    """
    view = memoryview(content)
    start = 0
    while start < len(content):
        stop = border(view, start, start + max(block_bytes, 4))
        try:
            text = str(view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(_not_utf8(content, start + error.start)) from error
        yield text
        start = stop


def border(view: memoryview, start: int, stop: int) -> int:
    """Return the last index in (start, stop] at which a UTF-8 character may begin, or the end."""
    if stop >= len(view):
        return len(view)
    # Continuation bytes are 10xxxxxx, at most three in a row; more are invalid, which `blocks` reports.
    return next((i for i in range(stop, max(stop - 4, start), -1) if view[i] & 0xC0 != 0x80), stop)


def printable(path: str) -> str:
    """Return a file name as text that any Unicode encoding accepts, with non-UTF-8 bytes as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_blank(content: bytes) -> bool:
    """Return True if a text is only white space; all of it is checked to be UTF-8.

    Raises:
        BadRecord: as in `blocks`.
    """
    blank = True
    for block in blocks(content):
        blank = blank and not block.strip()
    return blank


def _not_utf8(content: bytes, position: int) -> str:
    line = content.count(b"\n", 0, position) + 1
    column = position - content.rfind(b"\n", 0, position)
    where = f"byte {column}" if line == 1 else f"byte {column} of line {line}"
    return f"not UTF-8 ({where} is 0x{content[position]:02x}); convert it to UTF-8"
