"""Long texts as UTF-8 bytes: a Python str takes four bytes a character as soon as one of them is an emoji."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Utf8:
    """A text of a record that is not decoded yet, and so not known to be UTF-8."""

    content: bytes


def decode(content: bytes) -> str:
    """UTF-8, strictly.

    Raises:
        ValueError: naming the line and the byte in it that are not UTF-8.
    """
    return "".join(blocks(content, len(content)))


def blocks(content: bytes, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """Yield the text in pieces of at most `block_bytes` of UTF-8 (at least one character each).

    Raises:
        ValueError: while iterating, naming the line and the byte in it that are not UTF-8.
    """
    view = memoryview(content)
    start = 0
    while start < len(content):
        stop = border(view, start, start + max(block_bytes, 4))
        try:
            text = str(view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(content, start + error.start)) from error
        yield text
        start = stop


def border(view: memoryview, start: int, stop: int) -> int:
    """The last index in (start, stop] where a character of UTF-8 may begin, or the end."""
    if stop >= len(view):
        return len(view)
    return next((i for i in range(stop, max(stop - 4, start), -1) if view[i] & 0xC0 != 0x80), stop)


def printable(path: str) -> str:
    """A file's name as text that every encoding of Unicode takes; its bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_blank(content: bytes) -> bool:
    """Whether a text is white space only; all of it is checked to be UTF-8.

    Raises:
        ValueError: as `blocks`.
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
