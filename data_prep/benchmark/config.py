"""Config of the verb `benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field

from clex_train.harness.benchmark import Kind
from clex_train.utils.errors import require


@dataclass
class BenchmarkVerb:
    """Keys of the verb."""

    kind: Kind | None = None
    """Benchmark that the files are of."""
    paths: list[str] = field(default_factory=list)
    """Published files, folders with them (read recursively) and .zip archives: .jsonl, .json, .parquet."""
    output: str | None = None
    """Folder to write: rows and a task file for each task, and benchmark.json. It cannot be moved afterwards."""
    tasks: list[str] = field(default_factory=list)
    """Only these of the benchmark's tasks, by their published names (qasper, niah_single_1, qa1); by default all."""
    allow_partial: bool = False
    """Accept a task with another number of rows than was published, such as your own selection; tables say so."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        require(len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "name each task once")
