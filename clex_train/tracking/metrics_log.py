"""`metrics.jsonl`, the append-only log of a run. Neither a damaged line nor a full disk stops training.

On resume the file is truncated to the resumed step, so that every step occurs once. Unreadable lines move to
`metrics.jsonl.damaged`.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

from clex_train.utils import files, log

logger = log.get(__name__)

LONGEST_LINE = 2**20
"""Largest line that readers accept, in bytes; typical lines have a few hundred."""
MOST_STEPS = 2**62
"""Upper bound of a step number; larger ones count as damage."""


class MetricsLog:
    """Appends whole lines. On a full disk, lines wait in memory until they can be written; `failure` has the error."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.failure: OSError | None = None
        self.rows = cut_back(path, step)
        self._waiting = b""
        self._file = open_to_append(path)

    def append(self, row: dict[str, Any]) -> None:
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
        self.rows = cut_back(self.path, step)
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


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to `step`, move unreadable ones to a file of their own, and return the kept rows."""
    lines = _lines(path)
    rows = [parse(line) for line in lines]
    damaged = [line for line, row in zip(lines, rows, strict=True) if row is None]
    kept = [(line, row) for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    if damaged:
        aside = path.with_name(path.name + files.DAMAGED)
        every = [*_lines(aside), *(line.rstrip(b"\n") + b"\n" for line in damaged)]
        files.write_atomically(aside, b"".join(every))
        logger.warning("%s: unreadable lines moved to %s: %d", path, aside.name, len(damaged))
    # Rewriting a large log on every start would be slow and would change the inode that `tail -f` follows.
    if len(kept) < len(lines):
        files.write_atomically(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def _lines(path: Path) -> list[bytes]:
    """Read the lines of a log. Returns none without a file; anything that is not a regular file is set aside."""
    try:
        with files.open_regular(path, within=path.parent) as file:
            return file.readlines()
    except FileNotFoundError:
        return []
    except files.BadFile as error:
        logger.warning("%s; moved to %s, starting a new file", error, files.set_aside(path).name)
        return []


def parse(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log into a row with a step; None for a damaged line."""
    try:
        # No newline at the end means that the write was cut short.
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    # `type`, since bool is a subclass of int.
    is_row = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
    return row if is_row else None
