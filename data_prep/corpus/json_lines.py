"""Parse a line of JSON whose text may have hundreds of megabytes, without ever holding it as one Python str.

The members of the object are located first, as slices of the line; a long text is then unescaped block by block into
UTF-8. If this strict and fast parser rejects a line, Python's own decides: it accepts NaN and integers of any size, and
reports the column of a syntax error.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from data_prep.corpus.bad_record import BadRecord
from data_prep.corpus.utf8 import BLOCK_BYTES, Utf8, border, decode

LONG_BYTES = 1 << 20
"""Length from which a text stays UTF-8; a str of it may take four times the memory."""

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_LOW_SURROGATE = re.compile(rb"\\u[dD][c-fC-F]")
_LONGEST_ESCAPE = len(r"\ud83d\ude00")


class _Unread:
    """Placeholder for a member that was not requested and therefore not decoded."""

    def __repr__(self) -> str:
        return "(not read)"


UNREAD = _Unread()


def parse(line: bytes, text_field: str, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the object in a line; return its text, if long, as `Utf8`.

    Args:
        line: may have white space around the object.
        text_field: name of the member with the text; a dot descends into a nested object.
        names: members to decode, `text_field` included; the others become `UNREAD`. Default: all.

    Raises:
        BadRecord: the JSON is malformed, not an object, or not UTF-8.
    """
    with suppress(ValueError, RecursionError, msgspec.DecodeError):  # msgspec 0.20: DecodeError is not a ValueError
        return {
            key: _value(memoryview(raw), key, text_field) if _is_wanted(key, names) else UNREAD
            for key, raw in _MEMBERS.decode(line).items()
        }
    return {key: value if _is_wanted(key, names) else UNREAD for key, value in _parse_slowly(line).items()}


def unescape(string: memoryview, block_bytes: int = BLOCK_BYTES) -> bytes:
    """Unescape the inside of a JSON string to UTF-8.

    Args:
        string: the bytes between the quotes.
        block_bytes: bytes to unescape at a time; at least 16, more than the longest escape.

    Raises:
        BadRecord: the string is malformed or contains half of a surrogate pair.
    """
    content = io.BytesIO()
    start = 0
    while start < len(string):
        stop = _cut(string, start, start + block_bytes)
        try:
            content.write(_STRING.decode(b'"%b"' % bytes(string[start:stop])).encode())
        except msgspec.DecodeError as error:  # msgspec 0.20: not a ValueError
            raise BadRecord(str(error)) from error
        start = stop
    return content.getvalue()


def _is_wanted(key: str, names: Sequence[str] | None) -> bool:
    return names is None or any(name == key or name.startswith(f"{key}.") for name in names)


def _members(content: memoryview, text_field: str) -> dict[str, Any]:
    return {key: _value(memoryview(raw), key, text_field) for key, raw in _MEMBERS.decode(content).items()}


def _value(raw: memoryview, key: str, text_field: str) -> Any:
    if len(raw) >= LONG_BYTES:
        if key == text_field and raw[0] == ord('"'):
            return Utf8(unescape(raw[1:-1]))
        if text_field.startswith(f"{key}.") and raw[0] == ord("{"):
            return _members(raw, text_field.removeprefix(f"{key}."))
    try:
        return msgspec.json.decode(raw)
    except msgspec.ValidationError:  # a number of more than 64 bits
        return json.loads(bytes(raw), parse_int=_integer)


def _parse_slowly(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(decode(line.rstrip()), parse_int=_integer)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise BadRecord(f"malformed JSON ({reason})") from error
    except RecursionError as error:
        raise BadRecord("malformed JSON (nested too deeply)") from error
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, found {type(record).__name__}")
    return record


def _integer(digits: str) -> int | float:
    """Convert digits to an integer, or to a float (possibly infinite) if there are too many."""
    # Python refuses integers of more than 4,300 digits (CVE-2020-10735); no field of that size is used as a number.
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _cut(string: memoryview, start: int, stop: int) -> int:
    """Find a cut in (start, stop] between two characters, and not inside an escape or a surrogate pair."""
    if stop >= len(string):
        return len(string)
    window = bytes(string[start:stop])
    end = len(window)
    while (backslash := window.rfind(b"\\", 0, end)) >= 0:
        # Beyond the longest escape (a surrogate pair of 12 bytes) no open escape can reach the end.
        if end - backslash > _LONGEST_ESCAPE:
            break
        run = backslash + 1 - len(window[: backslash + 1].rstrip(b"\\"))
        end = backslash if run % 2 else backslash - 1  # an even run is escaped backslashes; its last pair begins here
        if end > 0 and not _LOW_SURROGATE.match(string, start + end):
            return start + end
    # No escape can be open here. A block of nothing but escapes has no cut, so take the whole rest.
    return border(string, start, start + end) if end > 0 else len(string)
