"""metrics.jsonl: a line of JSON for each figure of a run. A damaged line or a full disk costs no step.

At the start of a run the file is cut back to the resumed step, so that every step stands in it once; lines that cannot
be read are moved to `metrics.jsonl.damaged`.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

from clex_train.utils import files, log

logger = log.get(__name__)

LONGEST_LINE = 2**20
"""Bytes of a line that a reader takes at once; most have some hundred."""
MOST_STEPS = 2**62


class MetricsLog:
    """Appends whole lines. Lines that find no room wait in memory, and `failure` says why, until they are written."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.failure: OSError | None = None
        self.rows = cut_back(path, step)
        self._waiting = b""
        self._file = open_to_append(path)

    def append(self, row: dict[str, Any]) -> None:
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
        self.rows = cut_back(self.path, step)
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


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to a step, set aside those that cannot be read, and return what is kept.

    The file is written anew only where that changes it.
    """
    lines = _lines(path)
    rows = [parse(line) for line in lines]
    damaged = [line for line, row in zip(lines, rows, strict=True) if row is None]
    kept = [(line, row) for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    if damaged:
        aside = path.with_name(path.name + files.DAMAGED)
        every = [*_lines(aside), *(line.rstrip(b"\n") + b"\n" for line in damaged)]
        files.write_atomically(aside, b"".join(every))
        logger.warning("%s: lines that cannot be read: %d; they are kept in %s", path, len(damaged), aside.name)
    if len(kept) < len(lines):
        files.write_atomically(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def _lines(path: Path) -> list[bytes]:
    """Read the lines of a log; none where there is no file, or where something else in its place is set aside."""
    try:
        with files.open_regular(path, within=path.parent) as file:
            return file.readlines()
    except FileNotFoundError:
        return []
    except files.BadFile as error:
        logger.warning("%s; kept as %s, a new file begins", error, files.quarantine(path).name)
        return []


def parse(line: bytes) -> dict[str, Any] | None:
    """Return a whole line of the log as a row with a step, or None for one that is damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
    return row if is_row else None
