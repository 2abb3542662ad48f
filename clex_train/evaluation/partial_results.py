"""Keep the finished part of an evaluation on disk, so that the same command resumes it after a kill.

The file lies next to the result, `<label>.<16 hex digits>.partial`: JSON with the facts that shape the numbers (the
digits are their hash), the finished cells by key, and the finished pieces of the cell in progress. Every write replaces
the whole file atomically, so a kill at any moment leaves the last complete one. Other facts give another file: results
of other settings, weights or data are named in one line and never read. Rank 0 reads and writes; all ranks hold the
same content, so they agree on which collectives are left.
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
"""Between two writes for pieces of a cell."""
WRITES = 50
"""Time between those writes in units of what the last one took: at most 2 % of the time goes into them."""

Decoded = TypeVar("Decoded")

logger = log.get(__name__)


class Partial:
    """What an evaluation has finished so far. Without a path nothing is kept, and no call costs a collective."""

    def __init__(self, path: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.facts = path, dict(facts or {})
        self.cells: dict[str, Any] = {}
        self._pieces: tuple[str, Any] | None = None
        self._written, self._cost, self._complained = time.monotonic(), 0.0, False

    def find(self, keys: list[str], decode: Callable[[Any], Decoded]) -> list[Decoded] | None:
        """Return the finished cells of these keys, None unless all are there. Damaged ones count as unfinished."""
        try:
            return [decode(self.cells[key]) for key in keys]
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def finish(self, cells: Mapping[str, Any], at_once: bool = True) -> None:
        """Add finished cells (JSON by key) in place of their pieces; every rank calls it with the same content.

        With `at_once=False` the write may wait for a later one, for cells that cost less than a write.
        """
        new = {key: cell for key, cell in cells.items() if key not in self.cells}
        if not new:
            return
        self.cells |= new
        self._pieces = None
        if at_once or self._has_waited():
            self._write()

    def pieces(self, key: str) -> Any:
        """Return what `keep` was last given for this cell; None if nothing."""
        return self._pieces[1] if self._pieces is not None and self._pieces[0] == key else None

    def is_due(self) -> bool:
        """Tell whether the pieces of the cell in progress should be kept now: rank 0's clock decides. Collective."""
        return self.path is not None and bool(distributed.broadcast_object(self._has_waited()))

    def keep(self, key: str, content: Any) -> None:
        """Keep finished pieces (JSON) of the cell in progress; every rank calls it with the same content."""
        self._pieces = (key, content)
        self._write()

    def remove(self) -> None:
        """Delete the file: the result has been written."""
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
        """Log once that nothing is kept: the evaluation itself needs no file until its end."""
        assert self.path is not None
        with suppress(OSError):
            temporary_path(self.path).unlink(missing_ok=True)
        if not self._complained:
            reason = error.strerror or first_line(error)
            logger.warning("%s: cannot be written (%s); an interruption now would lose more", self.path, reason)
        self._complained = True


def resume(output: Path, facts: Mapping[str, Any]) -> Partial:
    """Return what was finished of an evaluation by these facts whose result goes to `output`. Collective.

    `facts` are everything that the numbers depend on, as flat JSON. Partial files of other facts are named in a line.
    """
    plain = json.loads(json.dumps(facts, default=str))
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
    partial = Partial(_place(output, digest), plain)
    if distributed.is_main():
        assert partial.path is not None
        _name_others(output, partial)
        content = _content(partial.path)
        if content is not None and content["facts"] == plain:
            partial.cells, partial._pieces = content["cells"], content["pieces"]
    partial.cells, partial._pieces = distributed.broadcast_object((partial.cells, partial._pieces))
    return partial


def say_found(partial: Partial, total: int, of: str = "cells") -> None:
    """Say in one line how much of the evaluation is there already."""
    if partial.cells and distributed.is_main():
        found = f"{len(partial.cells)} of {total} {of} found from an interrupted evaluation"
        logger.info("%s (%s)", found, partial.path)


def _place(output: Path, digest: str) -> Path:
    name = f"{output.stem}.{digest}{SUFFIX}"
    is_short = len(os.fsencode(name)) <= LONGEST_NAME
    return output.with_name(name if is_short else f"{digest}{SUFFIX}")


def _content(path: Path) -> dict[str, Any] | None:
    """Read a partial file; None where there is none, and with a line for one that is damaged."""
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
        logger.warning("%s: damaged (%s), not used; the evaluation starts from its beginning", path, reason)
        return None
    return content if isinstance(content, dict) else None


def _is_pair(pieces: Any) -> bool:
    return isinstance(pieces, list) and len(pieces) == 2 and isinstance(pieces[0], str)


def _name_others(output: Path, own: Partial) -> None:
    """Name the newest partial file of the same result that other facts made, and how many there are."""
    # Not what is globbed: a label may have brackets, and be the beginning of another.
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
        "%s%s is of an interrupted evaluation with other %s and is not used; give that command again, or delete it",
        newest,
        more,
        ", ".join(differing[:6]) or "content",
    )
