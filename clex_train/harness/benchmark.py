"""A benchmark in a folder: rows and task files of lm-eval, and `benchmark.json`, which lists them with checksums.

`python -m data_prep benchmark` writes it from the published files. A task has the name that lm-eval gives it, and the
folder's own index hides the tasks of the package, so nothing is fetched.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clex_train.utils.errors import ConfigError, first_line, require
from clex_train.utils.files import BadFile, sha256
from clex_train.utils.records import convert, read_json
from clex_train.utils.versions import install_command

MANIFEST = "benchmark.json"
FORMAT = 1
AGAIN = "convert the published files again with `python -m data_prep benchmark`"


class Kind(Enum):
    longbench = "longbench"
    longbench_v2 = "longbench_v2"
    ruler = "ruler"
    babilong = "babilong"


class Mean(Enum):
    """Mean of a benchmark over its tasks."""

    categories = "categories"
    """Mean of the categories, each the mean of its tasks."""
    tasks = "tasks"
    """Mean of the tasks."""
    rows = "rows"
    """Mean of all rows: tasks are weighted by their size."""


@dataclass(frozen=True)
class BenchmarkTask:
    """A task of the folder."""

    name: str
    """Name for `tasks=`, and of the task file."""
    group: str
    """Benchmark that the task is averaged in, such as `LongBench` or `RULER 4096`."""
    category: str
    """Category within the group, a line of the table."""
    num_rows: int
    sha256: str
    """Of the file of rows."""
    definition: str
    """Hash of the task file without paths, 16 hex digits."""
    in_chat: bool = True
    """False for a task whose prompts LongBench gives to chat models without a template."""

    @property
    def data(self) -> str:
        """Name of the file of rows."""
        return f"{self.name}.jsonl"

    @property
    def fingerprint(self) -> str:
        """Identity of prompts, metric and rows, the same wherever the folder is."""
        return f"{self.definition}-{self.sha256[:16]}"


@dataclass(frozen=True)
class Group:
    """A benchmark that has an average."""

    name: str
    num_tasks: int
    """Tasks that the published benchmark has; with fewer, an average is of a part."""
    mean: Mean


@dataclass(frozen=True)
class Benchmark:
    """Contents of `benchmark.json`."""

    kind: Kind
    place: str
    """Folder that the paths in the task files name."""
    stock: str
    """Folder of lm-eval's own task files, which ours include."""
    sources: list[str]
    """Files that were converted."""
    groups: list[Group]
    tasks: list[BenchmarkTask]
    format: int = FORMAT
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader of a table, such as the number of rows of a part."""

    def to_dict(self) -> dict[str, Any]:
        """Return the contents for JSON."""
        plain = asdict(self) | {"kind": self.kind.value}
        return plain | {"groups": [asdict(group) | {"mean": group.mean.value} for group in self.groups]}

    def task(self, name: str) -> BenchmarkTask | None:
        """Return the task of that name, if there is one."""
        return next((task for task in self.tasks if task.name == name), None)


def stock_tasks() -> Path:
    """Return the folder of lm-eval's own task files; `ConfigError` with the remedy if it is not installed."""
    # The specification alone: importing lm-eval takes seconds.
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise ConfigError("lm-eval is not installed", None, install_command("eval"))
    return Path(found.origin).parent / "tasks"


def read(folder: Path) -> Benchmark:
    """Read a benchmark and compare its checksums; `ConfigError` names the file that is missing or differs."""
    require(folder.is_dir(), "benchmark", folder, f"no such folder; {AGAIN}")
    try:
        content = read_json(folder / MANIFEST, within=folder)
        found = convert(content, Benchmark)
    except FileNotFoundError as error:
        raise ConfigError("benchmark", folder, f"has no {MANIFEST}; {AGAIN}, or use include={folder}") from error
    except (BadFile, ValueError) as error:
        raise ConfigError(folder / MANIFEST, None, f"damaged ({first_line(error)}); {AGAIN}") from error
    require(found.format == FORMAT, str(folder / MANIFEST), found.format, f"not of format {FORMAT}; {AGAIN}")
    # Task files name data and stock files by absolute paths, because lm-eval resolves no others.
    for what, named, now in (("place", found.place, folder.resolve()), ("lm-eval", found.stock, stock_tasks())):
        require(Path(named) == now, "benchmark", folder, f"was written for {what} {named}, not {now}; {AGAIN}")
    for task in found.tasks:
        _require_whole(folder, task)
    return found


def _require_whole(folder: Path, task: BenchmarkTask) -> None:
    for name in (task.data, f"{task.name}.yaml"):
        require((folder / name).is_file(), "benchmark", folder, f"{name} is missing; {AGAIN}")
    same = sha256(folder / task.data, within=folder) == task.sha256
    require(same, "benchmark", folder, f"{task.data} has changed since it was converted; {AGAIN}")
