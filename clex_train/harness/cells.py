"""Finished cells of an evaluation by lm-eval: one task by one method, a JSON file each.

They stay when the evaluation is done. The same command goes on behind them, and another one with more tasks or methods
computes only those. A cell is read if weights, tokenizer, rows and settings are those of its file; versions, device and
commit are recorded, and a difference is logged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.utils import distributed, log
from clex_train.utils.files import LONGEST_NAME, BadFile, make_folder, write_atomically
from clex_train.utils.records import convert, read_json

FORMAT = 1

logger = log.get(__name__)


@dataclass(frozen=True)
class Cell:
    """The harness's results on one task, by one method."""

    task: str
    method: str
    """Empty for the unchanged model."""
    frequencies: str
    """Source of the frequencies: `clex`, `none`, `ntk`, ..."""
    results: dict[str, Any]
    """`results`, `configs`, `versions`, `n-shot` and `n-samples` of lm-eval, each by task."""
    num_prompts: int
    num_shortened: int
    """Prompts that lost tokens."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Commit, versions and device."""

    @property
    def scores(self) -> dict[str, Any]:
        """Return lm-eval's metrics of the task, such as `score,none` and `score_stderr,none`."""
        found: dict[str, Any] = self.results["results"][self.task]
        return found


class Cells:
    """Folder of finished cells; nothing is saved without one.

    Args:
        folder: place of the files.
        facts: everything that the scores of all cells depend on, as JSON.
        by_task: the same for single tasks: identity of their rows and prompts.
        environment: recorded in new cells.
    """

    def __init__(
        self,
        folder: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        by_task: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.environment = folder, dict(environment or {})
        self._facts, self._by_task = dict(facts or {}), dict(by_task or {})

    def find(self, task: str, method: str) -> Cell | None:
        """Return the cell if its file is there and has the same facts. Collective."""
        # Rank 0 decides: a shared file system may show ranks different files.
        cell: Cell | None = distributed.broadcast_object(self._read(task, method) if distributed.is_main() else None)
        return cell

    def keep(self, cell: Cell) -> None:
        """Save a finished cell. Raises `OSError` if the file cannot be written."""
        if self.folder is None or not distributed.is_main():
            return
        facts = self._facts_of(cell.task, cell.method)
        make_folder(self.folder)
        content = {"format": FORMAT, "facts": facts, **vars(cell)}
        write_atomically(self._path(cell.task, cell.method, facts), json.dumps(content, indent=1, default=str) + "\n")

    def _read(self, task: str, method: str) -> Cell | None:
        if self.folder is None:
            return None
        facts = self._facts_of(task, method)
        path = self._path(task, method, facts)
        try:
            content = read_json(path, within=self.folder)
            if content["format"] != FORMAT or content["facts"] != facts:
                raise ValueError("not of these settings")
            cell = convert({key: content[key] for key in Cell.__dataclass_fields__}, Cell)
            if not isinstance(cell.scores, dict):
                raise ValueError("no scores")
        except FileNotFoundError:
            return None
        except (BadFile, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s) and not used; the cell is computed again", path, error)
            return None
        differing = [key for key, value in self.environment.items() if cell.environment.get(key) != value]
        if differing:
            logger.info("%s was computed with another %s; delete the file to repeat it", path, ", ".join(differing))
        return cell

    def _facts_of(self, task: str, method: str) -> dict[str, Any]:
        whole = {**self._facts, "task": task, "method": method, "rows": self._by_task.get(task, "")}
        # Through JSON, so that tuples and paths compare equal to what is read back.
        plain: dict[str, Any] = json.loads(json.dumps(whole, default=str))
        return plain

    def _path(self, task: str, method: str, facts: Mapping[str, Any]) -> Path:
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
        name = f"{task}.{method or 'model'}.{digest}.json".replace(os.sep, "_")
        # File systems limit names to 255 bytes.
        is_short = len(os.fsencode(name)) <= LONGEST_NAME
        assert self.folder is not None
        return self.folder / (name if is_short else f"{digest}.json")
