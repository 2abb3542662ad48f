"""Partial results of an evaluation on disk, so that the same command resumes it after a kill.

`<label>.<16 hex digits>.partial`, next to the result, is JSON with the facts that determine the numbers (the digits are
their hash), the finished cells by key, and the finished pieces of the current cell. Each write replaces the whole file
atomically. Other settings, weights or data have another hash and file, which is logged and never read. Rank 0 reads
and writes; all ranks have the same content, so they agree on the remaining collectives.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from clex_train.evaluation.results import LARGEST
from clex_train.utils import distributed, log
from clex_train.utils.errors import first_line
from clex_train.utils.files import LONGEST_NAME, BadFile, temporary_path, write_atomically
from clex_train.utils.records import read_json

FORMAT = 1
SUFFIX = ".partial"
LEAST_SECONDS = 0.2
"""Minimum seconds between two writes of pieces."""
WRITES = 50
"""Time between two such writes, in units of the last write's duration: writing takes at most 2 % of the time."""

Decoded = TypeVar("Decoded")

logger = log.get(__name__)


class Partial:
    """Finished part of an evaluation. Without a path nothing is saved, and no call is a collective."""

    def __init__(self, path: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.facts = path, dict(facts or {})
        self.cells: dict[str, Any] = {}
        self._pieces: tuple[str, Any] | None = None
        self._written, self._cost, self._complained = time.monotonic(), 0.0, False

    def find(self, keys: list[str], decode: Callable[[Any], Decoded]) -> list[Decoded] | None:
        """Return the finished cells of these keys, or None unless all are finished."""
        # A damaged cell counts as unfinished: computing it again is always safe.
        try:
            return [decode(self.cells[key]) for key in keys]
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def finish(self, cells: Mapping[str, Any], at_once: bool = True) -> None:
        """Add finished cells (JSON by key), which replace their pieces. Call it on every rank with the same content.

        With `at_once=False` the write may be delayed, for cells that are cheaper than a write.
        """
        new = {key: cell for key, cell in cells.items() if key not in self.cells}
        if not new:
            return
        self.cells |= new
        self._pieces = None
        if at_once or self._has_waited():
            self._write()

    def pieces(self, key: str) -> Any:
        """Return the pieces that `keep` last saved for this cell, or None."""
        return self._pieces[1] if self._pieces is not None and self._pieces[0] == key else None

    def is_due(self) -> bool:
        """Return True if it is time to save the pieces of the current cell. Collective."""
        # Rank 0's clock decides: saving is a collective, so all ranks must do it at the same piece.
        return self.path is not None and bool(distributed.broadcast_object(self._has_waited()))

    def keep(self, key: str, content: Any) -> None:
        """Save finished pieces (JSON) of the current cell. Call it on every rank with the same content."""
        self._pieces = (key, content)
        self._write()

    def remove(self) -> None:
        """Delete the file, once the result has been written."""
        if self.path is not None and distributed.is_main():
            for path in (self.path, temporary_path(self.path)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _has_waited(self) -> bool:
        return time.monotonic() - self._written >= max(LEAST_SECONDS, WRITES * self._cost)

    def _write(self) -> None:
        if self.path is None or not distributed.is_main():
            return
        start = time.monotonic()
        content = {"format": FORMAT, "facts": self.facts, "cells": self.cells, "pieces": self._pieces}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(content).encode())
        except OSError as error:
            self._complain(error)
        self._written = time.monotonic()
        self._cost = self._written - start

    def _complain(self, error: OSError) -> None:
        """Log once that partial results cannot be saved."""
        # Not an error: the evaluation needs no file until its end.
        assert self.path is not None
        with suppress(OSError):
            temporary_path(self.path).unlink(missing_ok=True)
        if not self._complained:
            reason = error.strerror or first_line(error)
            logger.warning("%s: cannot be written (%s); an interruption would lose the work so far", self.path, reason)
        self._complained = True


def resume(output: Path, facts: Mapping[str, Any]) -> Partial:
    """Load the partial results of an evaluation with these facts, whose result goes to `output`. Collective.

    `facts` are everything that the numbers depend on, as flat JSON. Partial files with other facts are logged.
    """
    # Through JSON, so that tuples and paths compare equal to what is read back.
    plain = json.loads(json.dumps(facts, default=str))
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
    partial = Partial(_place(output, digest), plain)
    if distributed.is_main():
        assert partial.path is not None
        _name_others(output, partial)
        content = _content(partial.path)
        if content is not None and content["facts"] == plain:
            partial.cells, partial._pieces = content["cells"], content["pieces"]
    # Read on rank 0 and broadcast: a shared file system may show ranks different versions of the file.
    partial.cells, partial._pieces = distributed.broadcast_object((partial.cells, partial._pieces))
    return partial


def log_found(partial: Partial, total: int, of: str = "cells") -> None:
    """Log how much of the evaluation is finished already."""
    if partial.cells and distributed.is_main():
        found = f"{len(partial.cells)} of {total} {of} found from an interrupted evaluation"
        logger.info("%s (%s)", found, partial.path)


def _place(output: Path, digest: str) -> Path:
    name = f"{output.stem}.{digest}{SUFFIX}"
    # File systems limit names to 255 bytes, and a label may be long.
    is_short = len(os.fsencode(name)) <= LONGEST_NAME
    return output.with_name(name if is_short else f"{digest}{SUFFIX}")


def _content(path: Path) -> dict[str, Any] | None:
    """Read a partial file; return None if it is missing or, with a warning, damaged."""
    try:
        content = read_json(path, within=path.parent, most=LARGEST)
        pieces = content["pieces"]
        good = isinstance(content["facts"], dict) and isinstance(content["cells"], dict)
        if not good or content["format"] != FORMAT or not (pieces is None or _is_pair(pieces)):
            raise ValueError("not of this format")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        reason = error.reason if isinstance(error, BadFile) else first_line(error)
        logger.warning("%s is damaged (%s) and not used; starting the evaluation over", path, reason)
        return None
    return content if isinstance(content, dict) else None


def _is_pair(pieces: Any) -> bool:
    return isinstance(pieces, list) and len(pieces) == 2 and isinstance(pieces[0], str)


def _name_others(output: Path, own: Partial) -> None:
    """Log the newest partial file of the same result with other facts, and their number."""
    # A regular expression, not a glob: a label may have brackets, and may be the beginning of another label.
    name = re.compile(re.escape(output.stem) + r"\.[0-9a-f]{16}" + re.escape(SUFFIX))
    found = output.parent.glob(f"*{SUFFIX}") if output.parent.is_dir() else ()
    others = [path for path in found if name.fullmatch(path.name) and path != own.path and path.is_file()]
    if not others:
        return
    newest = max(others, key=lambda path: path.stat().st_mtime)
    content = _content(newest)
    theirs = content["facts"] if content is not None else {}
    differing = [key for key in {**own.facts, **theirs} if own.facts.get(key) != theirs.get(key)]
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    logger.info(
        "%s%s is from an interrupted evaluation with other %s and is not used; repeat that command, or delete the file",
        newest,
        more,
        ", ".join(differing[:6]) or "content",
    )
