"""Readers of raw text: each turns a piece of a corpus into numbered records, one at a time.

A record is read first and parsed after, so that a bad one can be named by its place and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_train.faults import first_line
from data_prep import hub, json_lines
from data_prep.config import CorpusConfig
from data_prep.sources import Piece
from data_prep.streams import DamagedStream, open_stream
from data_prep.utf8 import Utf8

PARQUET_ROWS = 64
PARQUET_BATCH_BYTES = 4_000_000
_BOM = b"\xef\xbb\xbf"


class Raw:
    """Record `number` (from 1) of a piece, as read; `consumed`: bytes of the piece on disk read so far."""

    def __init__(self, number: int, content: Any, consumed: int) -> None:
        self.number, self.consumed = number, consumed
        self._content = content

    def take(self) -> Any:
        """The content, once: it is not kept here, where it would double the memory that a long document takes."""
        content, self._content = self._content, None
        return content


@dataclass(frozen=True)
class Reader:
    """`read` yields the records of a piece; `parse` makes a dict of one or raises `ValueError`; `unit` names one.

    Texts may stay `Utf8` in the dict.
    """

    read: Callable[[Piece, CorpusConfig], Iterator[Raw]]
    parse: Callable[[Any, CorpusConfig], dict[str, Any]]
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
                if line.isspace():
                    continue
                first = piece.start == 0 and number == 1
                consumed = raw.tell() if whole else position - piece.start
                record = Raw(number, line.removeprefix(_BOM) if first else line, consumed)
                del line  # it may be long, and this function waits while its text is worked on
                yield record
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{place(piece, number + 1)}: {error}") from error


def _parse_json(line: bytes, corpus: CorpusConfig) -> dict[str, Any]:
    return json_lines.parse(line, corpus.text_field)


def _read_whole(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    try:
        with open_stream(piece.path) as (content, _):
            yield Raw(1, (piece.path, content.read().removeprefix(_BOM)), piece.num_bytes)
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{piece.path}: {error}") from error


def _parse_text(file: tuple[str, bytes], corpus: CorpusConfig) -> dict[str, Any]:
    path, content = file
    return {corpus.text_field: Utf8(content), "meta": {"path": path}}


def _read_parquet(piece: Piece, corpus: CorpusConfig) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(
            piece.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            columns = _columns(piece, corpus, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata), columns=columns):
                for i in range(batch.num_rows):
                    number += 1
                    yield Raw(number, batch.slice(i, 1), piece.num_bytes * number // max(file.metadata.num_rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"{piece.path}: row {number + 1}: {first_line(error)}; fetch the file again") from error


def _rows_at_once(metadata: Any) -> int:
    """Rows of which none of the row groups has more than `PARQUET_BATCH_BYTES` on average."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(PARQUET_ROWS, int(PARQUET_BATCH_BYTES / max(row_bytes, 1))))


def _parse_row(row: Any, corpus: CorpusConfig) -> dict[str, Any]:
    """A batch of one row as a dict; its text is not decoded, so that one that is not UTF-8 is a bad record."""
    import pyarrow

    columns = dict(zip(row.schema.names, row.columns, strict=True))
    text = columns.pop(corpus.text_field, None)
    fields = {name: column[0].as_py() for name, column in columns.items()}
    if text is None:
        return fields
    if text.type in (pyarrow.string(), pyarrow.large_string()) and text.null_count == 0:
        return {corpus.text_field: Utf8(_cell(text)), **fields}
    return {corpus.text_field: text[0].as_py(), **fields}


def _cell(column: Any) -> bytes:
    """The bytes of a column of one text, copied once (`as_buffer` of a scalar would copy them once more)."""
    import pyarrow

    width = np.int32 if column.type == pyarrow.string() else np.int64
    _, offsets, content = column.buffers()
    start, stop = np.frombuffer(offsets, width)[column.offset : column.offset + 2].tolist()
    return content.slice(start, stop - start).to_pybytes() if stop > start else b""


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


def _as_is(record: dict[str, Any], corpus: CorpusConfig) -> dict[str, Any]:
    return record


READERS = {
    "jsonl": Reader(_read_lines, _parse_json, "line"),
    "txt": Reader(_read_whole, _parse_text, "file"),
    "parquet": Reader(_read_parquet, _parse_row, "row"),
    "hub": Reader(_read_hub, _as_is, "row"),
}


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
