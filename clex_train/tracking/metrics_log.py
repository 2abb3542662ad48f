"""`metrics.jsonl`, the append-only log of a run. Neither a damaged line nor a full disk stops training.

On resume the file is truncated to the resumed step, so that every step occurs once. Unreadable lines move to
`metrics.jsonl.damaged`. The file is read line by line, so its size does not matter.
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
"""Largest line that readers accept, in bytes; typical lines have a few hundred, plus up to 24 per row of the batch."""
MOST_DAMAGED = 2**28
"""Bytes of unreadable lines beyond which a file is not taken for a log."""
MOST_STEPS = 2**62
"""Upper bound of a step number; larger ones count as damage."""

REPLACED = "%s; moved to %s, starting a new file"
"""Warning for a file that is no log."""

Row = dict[str, Any]


class MetricsLog:
    """Appends whole lines. On a full disk, lines wait in memory until they can be written; `failure` has the error.

    `see` is called with each row that the file has at the start, and again when the log is cut back.
    """

    def __init__(self, path: Path, step: int, see: Callable[[Row], object]) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._see = see
        cut_back(path, step, see)
        self._waiting = b""
        self._file = open_to_append(path)

    def append(self, row: Row) -> None:
        """Append a line, after any that still wait."""
        # `allow_nan=False`: NaN is not JSON, and strict readers refuse the whole file.
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._write()

    def sync(self) -> None:
        """Flush the lines to disk (fsync)."""
        self._write()
        if self.failure is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.failure = error

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`, from which the run continues after a rollback."""
        self._write()
        # Closed first: the file may be replaced, and the old descriptor would append to the removed one.
        self._file.close()
        cut_back(self.path, step, self._see)
        self._file = open_to_append(self.path)

    def close(self) -> None:
        """Flush and close. Lines that cannot be written now are lost, which is logged."""
        self.sync()
        self._file.close()
        if lost := self._waiting.count(b"\n"):
            logger.error("%s: cannot be written; lines lost at its end: %d", self.path, lost)

    def _write(self) -> None:
        if not self._waiting:
            return
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            # A raw write may be partial, for example when the disk fills up.
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError as error:
            # Remove a partial line, or the next one would be appended to it.
            self._file.truncate(size)
            error.filename = str(self.path)
            self.failure = error
        else:
            self._waiting, self.failure = b"", None


def open_to_append(path: Path) -> io.FileIO:
    """Open the log unbuffered, so that a write fails at once or reaches the operating system."""
    # A buffered file would raise a full disk's error later, out of `close` or the garbage collector.
    return io.FileIO(path, "ab")


def cut_back(path: Path, step: int, see: Callable[[Row], object]) -> None:
    """Keep the lines up to `step`, move unreadable ones to a file of their own, and call `see` with each kept row."""
    damaged = later = size = 0
    for line, row in _lines(path):
        if row is None:
            damaged, size = damaged + 1, size + len(line)
            if size > MOST_DAMAGED:
                # A sparse file can be larger than the disk, so nothing of it is copied.
                reason = f"more than {MOST_DAMAGED >> 20} MiB of it cannot be read"
                logger.warning(REPLACED, f"{path}: {reason}", files.quarantine(path).name)
                return
        elif row["step"] > step:
            later += 1
        else:
            see(row)
    if damaged:
        aside = path.with_name(path.name + files.DAMAGED)
        files.write_parts(aside, chain((line for line, _ in _lines(aside)), _damaged(path)))
        logger.warning("%s: unreadable lines moved to %s: %d", path, aside.name, damaged)
    # Rewriting a large log on every start would be slow and would change the inode that `tail -f` follows.
    if damaged or later:
        files.write_parts(path, (line for line, row in _lines(path) if row is not None and row["step"] <= step))


def _lines(path: Path) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each line of a log and its row, None for a damaged one or a part of one longer than `LONGEST_LINE`.

    Yields nothing without a file; anything that is not a regular file is set aside.
    """
    try:
        file = files.open_regular(path, within=path.parent)
    except FileNotFoundError:
        return
    except files.BadFile as error:
        logger.warning(REPLACED, error, files.quarantine(path).name)
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
    """Parse a line of the log into a row with a step; None for a damaged line."""
    try:
        # No newline at the end means that the write was cut short.
        row = _decode(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    # `type`, since bool is a subclass of int.
    is_row = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
    return row if is_row else None


def _decode(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        # `json` takes NaN, which is no JSON; it is several times as slow.
        return json.loads(line)
