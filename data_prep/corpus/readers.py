"""Readers of raw text: each turns a piece of a corpus into numbered records, one at a time.

Reading a record and parsing it are separate steps, so that a bad one can be reported by its place and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_train.utils.errors import InputError, first_line
from data_prep.config import CorpusConfig
from data_prep.corpus import hub, json_lines
from data_prep.corpus.bad_record import BadRecord
from data_prep.corpus.sources import Piece
from data_prep.corpus.streams import DamagedStream, open_stream
from data_prep.corpus.utf8 import Utf8, printable

PARQUET_ROWS = 64
"""Rows to read at a time at most."""
PARQUET_BATCH_BYTES = 4_000_000
"""Bytes of rows to read at a time, on average: rows may be books."""
CHAT_FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""Names of the field with the turns in common chat data sets."""
_BOM = b"\xef\xbb\xbf"


class Raw:
    """Record `number` (from 1) of a piece, as read; `consumed` is the bytes of the piece read from disk so far."""

    def __init__(self, number: int, content: Any, consumed: int) -> None:
        self.number, self.consumed = number, consumed
        self._content = content

    def take(self) -> Any:
        """Return the content and forget it: keeping it would double the memory of a long document."""
        content, self._content = self._content, None
        return content


@dataclass(frozen=True)
class Reader:
    """Reads the records of a piece (`read`) and converts one to a dict or raises `BadRecord` (`parse`).

    Both get the names of the wanted fields, the text first; other fields are not converted. Texts may stay `Utf8` in
    the dict. `unit` is the word for a record in messages.
    """

    read: Callable[[Piece, CorpusConfig, Sequence[str]], Iterator[Raw]]
    parse: Callable[[Any, Sequence[str]], dict[str, Any]]
    unit: str


class Unreadable(InputError):
    """The rest of a piece cannot be read; unlike a bad record, this is never skipped."""


def place(piece: Piece, number: int) -> str:
    """Describe the place of a record for an error message: file and line (of the whole file), row or part."""
    if piece.format == "hub":
        return f"{piece.path}: part {piece.start} of {piece.stop}, row {number}"
    if READERS[piece.format].unit == "file":
        return piece.path
    return f"{piece.path}: {READERS[piece.format].unit} {number + _lines_before(piece)}"


def _read_lines(piece: Piece, corpus: CorpusConfig, names: Sequence[str]) -> Iterator[Raw]:
    """Yield the lines that begin in the piece; blank lines are counted but not yielded."""
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
                # Some editors write a byte order mark, which is not JSON.
                first = piece.start == 0 and number == 1
                consumed = raw.tell() if whole else position - piece.start
                record = Raw(number, line.removeprefix(_BOM) if first else line, consumed)
                del line  # it may be long, and this generator keeps its frame while the text is processed
                yield record
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{place(piece, number + 1)}: {error}") from error


def _parse_json(line: bytes, names: Sequence[str]) -> dict[str, Any]:
    return json_lines.parse(line, names[0], names)


def _read_whole(piece: Piece, corpus: CorpusConfig, names: Sequence[str]) -> Iterator[Raw]:
    try:
        with open_stream(piece.path) as (content, _):
            yield Raw(1, (piece.path, content.read().removeprefix(_BOM)), piece.num_bytes)
    except (DamagedStream, OSError) as error:
        raise Unreadable(f"{piece.path}: {error}") from error


def _parse_text(file: tuple[str, bytes], names: Sequence[str]) -> dict[str, Any]:
    path, content = file
    return {names[0]: Utf8(content), "meta": {"path": printable(path)}}


def _read_parquet(piece: Piece, corpus: CorpusConfig, names: Sequence[str]) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # pre_buffer would read whole row groups into memory; page checksums reveal damage that still decodes.
        with pyarrow.parquet.ParquetFile(
            piece.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            columns = _columns(piece, corpus, names, file)
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata), columns=columns):
                for i in range(batch.num_rows):
                    number += 1
                    yield Raw(number, batch.slice(i, 1), piece.num_bytes * number // max(file.metadata.num_rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"{piece.path}: row {number + 1}: {first_line(error)}; fetch the file again") from error


def _rows_at_once(metadata: Any) -> int:
    """Choose the rows to read at a time, so that no row group exceeds `PARQUET_BATCH_BYTES` on average."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(PARQUET_ROWS, int(PARQUET_BATCH_BYTES / max(row_bytes, 1))))


def _parse_row(row: Any, names: Sequence[str]) -> dict[str, Any]:
    """Convert a batch of one row to a dict."""
    import pyarrow

    columns = dict(zip(row.schema.names, row.columns, strict=True))
    # Null texts, and texts of another type, take the slow path, which names them.
    text = columns.get(names[0])
    # Keep the text as bytes: decoding here would make invalid UTF-8 an error of the file instead of a bad record.
    if text is not None and text.type in (pyarrow.string(), pyarrow.large_string()) and text.null_count == 0:
        del columns[names[0]]
        return {names[0]: Utf8(_cell(text)), **{name: _python(name, column) for name, column in columns.items()}}
    return {name: _python(name, column) for name, column in columns.items()}


def _python(name: str, column: Any) -> Any:
    """Return the only value of a column; raise `BadRecord` if Python has no type for it (a date before year 1)."""
    try:
        return column[0].as_py()
    except (OverflowError, ValueError) as error:
        raise BadRecord(f"column {name!r} has a value that cannot be read ({first_line(error)})") from error


def _cell(column: Any) -> bytes:
    """Return the bytes of a column with a single text."""
    # Slice the buffer directly: `as_buffer` of a scalar would make a second copy.
    import pyarrow

    width = np.int32 if column.type == pyarrow.string() else np.int64
    _, offsets, content = column.buffers()
    start, stop = np.frombuffer(offsets, width)[column.offset : column.offset + 2].tolist()
    return content.slice(start, stop - start).to_pybytes() if stop > start else b""


def _columns(piece: Piece, corpus: CorpusConfig, names: Sequence[str], file: Any) -> list[str]:
    """Choose the columns to read; of a nested column only the wanted member, so that others are not even decoded.

    Raises:
        Unreadable: the corpus names a column that does not exist.
    """
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    present = list(dict.fromkeys(file.schema_arrow.names))
    columns = []
    for name in names:
        if any(path == name or path.startswith(f"{name}.") for path in paths):
            columns.append(name)
        # A nested value that parquet keeps as one column (a map) cannot be selected below its top.
        elif name.partition(".")[0] in present:
            columns.append(name.partition(".")[0])
        elif key := key_of(corpus, name):
            raise Unreadable(f"{piece.path}: no column {name!r}, it has {', '.join(present)}; {remedy(key, present)}")
    return list(dict.fromkeys(columns))


def fields_of(corpus: CorpusConfig) -> list[str]:
    """List the fields that the corpus names, the text first."""
    return [corpus.text_field, *corpus.where, *([corpus.split_field] if corpus.split_field else [])]


def key_of(corpus: CorpusConfig, name: str) -> str:
    """Return the config key that names a field; an empty string for an optional field."""
    keys = {corpus.split_field or "": "corpus.split_field", **dict.fromkeys(corpus.where, "corpus.where")}
    return {**keys, corpus.text_field: "corpus.text_field"}.get(name, "")


def remedy(key: str, present: Iterable[str]) -> str:
    """Return the remedy for a record without the field that `key` names."""
    if key == "corpus.text_field":
        return chat_remedy(present) or "set corpus.text_field=NAME, one of these"
    return f"set {key} to one of these"


def chat_remedy(present: Iterable[str]) -> str:
    """Return the remedy for a record that holds a chat; an empty string if no field looks like one."""
    chat = [name for name in present if name in CHAT_FIELDS]
    if not chat:
        return ""
    return f"{chat[0]!r} looks like chat data: `python -m data_prep chat` reads conversations"


def _read_hub(piece: Piece, corpus: CorpusConfig, names: Sequence[str]) -> Iterator[Raw]:
    number = 0
    try:
        for record in hub.read_part(corpus, piece.start, piece.stop, fields_of(corpus), optional=names):
            number += 1
            yield Raw(number, record, 0)
    except BadRecord as error:
        raise Unreadable(f"{place(piece, number + 1)}: {error}") from error


def _as_is(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return record


READERS = {
    "jsonl": Reader(_read_lines, _parse_json, "line"),
    "txt": Reader(_read_whole, _parse_text, "file"),
    "parquet": Reader(_read_parquet, _parse_row, "row"),
    "hub": Reader(_read_hub, _as_is, "row"),
}


def _seek_line(content: Any, start: int) -> int:
    """Move to the first line that begins at or after `start` and return its offset."""
    # From one byte earlier: if that byte ends a line, the line at `start` belongs to this piece.
    content.seek(start - 1)
    return start - 1 + len(content.readline())


def _lines_before(piece: Piece) -> int:
    """Count the lines before the first line of a piece; reads the file, so only for messages."""
    if piece.start == 0 or READERS[piece.format].unit != "line":
        return 0
    with open(piece.path, "rb") as file:
        # Count in chunks: the file may be larger than memory.
        remaining = _seek_line(file, piece.start)
        file.seek(0)
        count = 0
        while remaining > 0:
            chunk = file.read(min(1 << 20, remaining))
            count, remaining = count + chunk.count(b"\n"), remaining - len(chunk)
        return count
