"""BABILong (Kuratov et al. 2024, arXiv 2406.10149): the files of RMT-team/babilong, qa1 to qa20 at lengths from 0k up.

Prompts, examples and metric are lm-eval's (`babilong_qa1`, ...), which reads one length; here each length is a task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from clex_train.harness.benchmark import Group, Mean
from clex_train.utils.errors import ConfigError
from data_prep.benchmark.datasets import Dataset, require_found, require_known
from data_prep.benchmark.rows import RowFile, require_columns, require_text

TASKS = tuple(f"qa{number}" for number in range(1, 21))
LENGTH = re.compile(r"(?<![0-9a-z])([0-9]+)([km])(?![0-9a-z])")
TASK = re.compile(r"(?<![0-9a-z])(qa[0-9]+)(?![0-9a-z])")
COLUMNS = ("input", "question", "target")


def convert(files: Sequence[RowFile], tasks: Sequence[str]) -> Iterator[Dataset]:
    """Yield a task for each file; its name and the folder above give task and length: qa1/4k.json, 4k/qa1.parquet."""
    require_known(tasks, TASKS)
    places: dict[tuple[int, str], tuple[str, RowFile]] = {}
    for file in files:
        task, length, label = _place(file)
        if (length, task) in places:
            raise ConfigError(file.name, None, f"{task} at {label} is in two places; name one")
        places[length, task] = (label, file)
    require_found(tasks, [task for _, task in places], files)
    for length, task in sorted(places, key=lambda place: (place[0], TASKS.index(place[1]))):
        if not tasks or task in tasks:
            yield _dataset(task, *places[length, task])


def _place(file: RowFile) -> tuple[str, int, str]:
    # The nearest names only: folders above may have any name.
    near = "/".join(file.parts[-2:]).lower()
    tasks, lengths = TASK.findall(near), LENGTH.findall(near)
    if not (tasks and lengths and tasks[-1] in TASKS):
        remedy = "gives no task and length; expected qa1/4k.json or 4k/qa1.parquet, with qa1 to qa20"
        raise ConfigError(file.name, None, remedy)
    number, unit = lengths[-1]
    return tasks[-1], int(number) * {"k": 10**3, "m": 10**6}[unit], f"{number}{unit}"


def _dataset(task: str, label: str, file: RowFile) -> Dataset:
    rows = file.rows()
    require_columns(file, rows, COLUMNS, ())
    require_text(file, rows, COLUMNS)
    return Dataset(
        published=task,
        name=f"babilong_{task}_{label}",
        source=file.name,
        group=Group(f"BABILong {label}", len(TASKS), Mean.tasks),
        category=task,
        rows=rows,
        stock=f"babilong/babilong_{task}.yaml",
        split=task,
        # Its loader fetches from the hub.
        fields={"custom_dataset": None},
    )
