"""metrics.jsonl: a line of JSON for each figure of a run. A damaged line or a full disk costs no step.

At the start of a run the file is cut back to the resumed step, so that every step stands in it once; lines that cannot
be read are moved to `metrics.jsonl.damaged`. A log of any size is read line by line.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from clex_train.utils import files, log

logger = log.get(__name__)

LONGEST_LINE = 2**22
"""Bytes of a line that a reader takes at once; most have some hundred, the rows of a step up to 24 each."""
MOST_STEPS = 2**62

Row = dict[str, Any]


class MetricsLog:
    """Appends whole lines. Lines that find no room wait in memory, and `failure` says why, until they are written.

    `see` is called with each row that is there already, at the beginning and again when the log is cut back.
    """

    def __init__(self, path: Path, step: int, see: Callable[[Row], object]) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._see = see
        cut_back(path, step, see)
        self._waiting = b""
        self._file = open_to_append(path)

    def append(self, row: Row) -> None:
        """Append a line, and those that waited before it."""
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._write()

    def sync(self) -> None:
        """Flush the lines to disk."""
        self._write()
        if self.failure is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.failure = error

    def cut_back(self, step: int) -> None:
        """Drop the lines after a step: it is going to be taken again."""
        self._write()
        self._file.close()
        cut_back(self.path, step, self._see)
        self._file = open_to_append(self.path)

    def close(self) -> None:
        """Flush and close. Lines that still find no room are lost, which is said."""
        self.sync()
        self._file.close()
        if lost := self._waiting.count(b"\n"):
            logger.error("%s: cannot be written; its last lines are lost: %d", self.path, lost)

    def _write(self) -> None:
        if not self._waiting:
            return
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError as error:
            # A line that was cut short would spoil the next one.
            self._file.truncate(size)
            error.filename = str(self.path)
            self.failure = error
        else:
            self._waiting, self.failure = b"", None


def open_to_append(path: Path) -> io.FileIO:
    """Open the log so that a write reaches the system or fails at once."""
    return io.FileIO(path, "ab")


def cut_back(path: Path, step: int, see: Callable[[Row], object]) -> None:
    """Keep the lines up to a step, set aside those that cannot be read, and call `see` with each row that is kept.

    The file is written anew only where that changes it.
    """
    damaged = later = 0
    for _, row in _lines(path):
        if row is None:
            damaged += 1
        elif row["step"] > step:
            later += 1
        else:
            see(row)
    if damaged:
        aside = path.with_name(path.name + files.DAMAGED)
        files.write_parts(aside, chain((line for line, _ in _lines(aside)), _damaged(path)))
        logger.warning("%s: lines that cannot be read: %d; they are kept in %s", path, damaged, aside.name)
    if damaged or later:
        files.write_parts(path, (line for line, row in _lines(path) if row is not None and row["step"] <= step))


def _lines(path: Path) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each line of a log and its row, None for a damaged one or a part of one longer than `LONGEST_LINE`.

    Yields nothing where there is no file, or where something else in its place is set aside.
    """
    try:
        file = files.open_regular(path, within=path.parent)
    except FileNotFoundError:
        return
    except files.BadFile as error:
        logger.warning("%s; kept as %s, a new file begins", error, files.quarantine(path).name)
        return
    with file:
        begins = True
        while line := file.readline(LONGEST_LINE):
            yield line, parse(line) if begins else None
            begins = line.endswith(b"\n")


def _damaged(path: Path) -> Iterator[bytes]:
    """Yield the damaged lines of a log; the last one may lack its end."""
    line = b"\n"
    for line, row in _lines(path):
        if row is None:
            yield line
    if not line.endswith(b"\n"):
        yield b"\n"


def parse(line: bytes) -> Row | None:
    """Return a whole line of the log as a row with a step, or None for one that is damaged."""
    try:
        row = _decode(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
    return row if is_row else None


def _decode(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        # `json` takes NaN, which is no JSON; it is several times as slow.
        return json.loads(line)
