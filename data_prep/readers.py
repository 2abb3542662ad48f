"""Readers of raw text: each turns a piece of a corpus into numbered records, one at a time.

A record is read first and parsed after, so that a bad one can be named by its place and left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep import hub
from data_prep.config import CorpusConfig
from data_prep.sources import Piece
from data_prep.streams import DamagedStream, open_stream

PARQUET_ROWS = 64
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Raw:
    """Record `number` (from 1) of a piece, as read; `consumed`: bytes of the piece on disk read so far."""

    number: int
    content: Any
    consumed: int


@dataclass(frozen=True)
class Reader:
    """`read` yields the records of a piece; `parse` makes a dict of one or raises `ValueError`; `unit` names one."""

    read: Callable[[Piece, CorpusConfig], Iterator[Raw]]
    parse: Callable[[Any], dict[str, Any]]
    unit: str


class Unreadable(ValueError):
    """The rest of a piece cannot be read; unlike a bad record, this is never skipped."""


def place(piece: Piece, number: int) -> str:
    """Where a record stands, for an error message: file and line (counted in the whole file), row or part."""
    if piece.format == "hub":
        return f"{piece.path}: part {piece.start} of {piece.stop}, row {number}"
    if READERS[piece.format].unit == "file":
        return piece.path
    return f"{piece.path}: {READERS[piece.format].unit} {number + _lines_before(piece)}"


def _read_lines(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    """The lines that begin in the piece; blank lines are counted, not yielded."""
    number = 0
    try:
        with open_stream(piece.path) as (content, raw):
            whole = content is not raw
            position = piece.start
            if piece.start:
                position = _seek_line(content, piece.start)
            while whole or position < piece.stop:
                line = content.readline()
                if not line:
                    return
                number, position = number + 1, position + len(line)
                if line.strip():
                    first = piece.start == 0 and number == 1
                    consumed = raw.tell() if whole else position - piece.start
                    yield Raw(number, line.removeprefix(_BOM) if first else line, consumed)
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{place(piece, number + 1)}: {error}") from error


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(decode(line.rstrip()))
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"malformed JSON ({reason})") from error
    except RecursionError as error:
        raise ValueError("malformed JSON (nested too deeply)") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, this is a {type(record).__name__}")
    return record


def _read_whole(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    try:
        with open_stream(piece.path) as (content, _):
            yield Raw(1, (piece.path, content.read().removeprefix(_BOM)), piece.num_bytes)
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{piece.path}: {error}") from error


def _parse_text(file: tuple[str, bytes]) -> dict[str, Any]:
    path, content = file
    return {"text": decode(content), "meta": {"path": path}}


def _read_parquet(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            columns = _columns(piece, corpus, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Raw(number, record, piece.num_bytes * number // max(file.metadata.num_rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(
            f"{piece.path}: row {number + 1}: {str(error).splitlines()[0]}; fetch the file again"
        ) from error


def _columns(piece: Piece, corpus: CorpusConfig, present: list[str]) -> list[str]:
    """The columns to read: those that the corpus names, and `meta`."""
    named = [corpus.text_field, *corpus.where, *([corpus.split_field] if corpus.split_field else [])]
    needed = {name if name in present else name.split(".")[0] for name in named}
    missing = sorted(needed.difference(present))
    if missing:
        raise Unreadable(
            f"{piece.path}: no column {missing[0]!r}, it has {', '.join(present)}; set corpus.text_field (or where, "
            "split_field) to one of these"
        )
    return [name for name in present if name in needed or name == "meta"]


def _read_hub(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    number = 0
    try:
        for record in hub.read_part(corpus, piece.start, piece.stop):
            number += 1
            yield Raw(number, record, 0)
    except ValueError as error:
        raise Unreadable(f"{place(piece, number + 1)}: {error}") from error


def _as_is(record: dict[str, Any]) -> dict[str, Any]:
    return record


READERS = {
    "jsonl": Reader(_read_lines, _parse_json, "line"),
    "txt": Reader(_read_whole, _parse_text, "file"),
    "parquet": Reader(_read_parquet, _as_is, "row"),
    "hub": Reader(_read_hub, _as_is, "row"),
}


def decode(content: bytes) -> str:
    """UTF-8, strictly.

    Raises:
        ValueError: naming the line and the byte in it that are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        where = f"byte {column}" if line == 1 else f"byte {column} of line {line}"
        raise ValueError(f"not UTF-8 ({where} is 0x{content[error.start]:02x}); convert it to UTF-8") from error


def _seek_line(content: Any, start: int) -> int:
    """Move to the first line that begins at or after `start`; returns its offset."""
    content.seek(start - 1)
    return start - 1 + len(content.readline())


def _lines_before(piece: Piece) -> int:
    """Lines of the file before the first one of a piece; read only when a message needs it."""
    if piece.start == 0 or READERS[piece.format].unit != "line":
        return 0
    with open(piece.path, "rb") as file:
        remaining = _seek_line(file, piece.start)
        file.seek(0)
        count = 0
        while remaining > 0:
            chunk = file.read(min(1 << 20, remaining))
            count, remaining = count + chunk.count(b"\n"), remaining - len(chunk)
        return count
