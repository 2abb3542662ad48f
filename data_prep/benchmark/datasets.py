"""The task of a benchmark between its published file and lm-eval: rows, and the fields of its task file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.harness.benchmark import Group
from clex_train.utils.errors import require
from data_prep.benchmark.rows import Row, RowFile


@dataclass(frozen=True)
class Dataset:
    """One task."""

    published: str
    """Name in the published files, for `tasks=`."""
    name: str
    """Name in lm-eval."""
    source: str
    group: Group
    category: str
    rows: list[Row]
    stock: str | None = None
    """lm-eval's task file, below its folder of tasks, with prompts and metric; None for a definition of our own."""
    split: str = "test"
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the task file."""
    scores: str | None = None
    """Function for `process_results`, by module and name."""
    counted: tuple[int, int] | None = None
    """Rows of the file, and rows of the published one, if that number is known."""
    in_chat: bool = True


Converter = Callable[[Sequence[RowFile], Sequence[str]], Iterator[Dataset]]
"""Read the files, for the named tasks or for all, one task at a time."""


def require_known(tasks: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a task that the benchmark does not have."""
    for name in tasks:
        require(name in [*known], "tasks", f"[{name}]", f"no task of this benchmark; it has {', '.join(known)}")


def require_found(tasks: Iterable[str], found: Iterable[str], paths: Sequence[RowFile]) -> None:
    """Raise `ConfigError` for a named task without a file."""
    missing = [name for name in tasks if name not in [*found]]
    folder = Path(paths[0].name).parent if paths else "paths"
    require(not missing, "tasks", f"[{','.join(missing)}]", f"no file of these is in {folder}; add it to paths")
