"""Evidence of a report: evaluation files and the folders of the runs behind them, read and checked.

    collect([Path("runs/a"), Path("runs/b/evaluation/step_500.json")])

A run folder stands for its newest evaluation and the others of the same weights. Parts that a run did not record (a
frequency table, retrieval tasks, the metrics of its training) are absent here, and figures that need them are omitted.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from clex_train.evaluation import results
from clex_train.evaluation.provenance import weights_hash
from clex_train.evaluation.results import Origin, Results
from clex_train.evaluation.tables import Row, Table, read_tables, rows_of
from clex_train.evaluation.task_scores import TaskScore
from clex_train.measures import tax
from clex_train.scaling.frequency_table import TABLE, FrequencyTable
from clex_train.tracking import saved_config
from clex_train.tracking.metrics_log import LONGEST_LINE, MOST_DAMAGED, parse
from clex_train.tracking.saved_config import CONFIG, FINAL
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, InputError
from clex_train.utils.files import BadFile, open_regular
from clex_train.utils.records import decode, read_json

logger = log.get(__name__)

UNKNOWN = "not recorded"
EVALUATIONS, METRICS, ENVIRONMENT = "evaluation", "metrics.jsonl", "environment.json"


@dataclass(frozen=True)
class _Environment:
    """Types in environment.json that a report relies on."""

    command: list[str] = field(default_factory=list)
    packages: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRun:
    """A run folder with the records of its training."""

    label: str
    folder: Path

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of optimizer steps in metrics.jsonl; empty without the file."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        return [row for row in _rows(path, self.folder) if "loss" in row]

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps int64 [n] and values float64 [n] of the steps that have a finite value under `key`."""
        pairs = [(row["step"], row[key]) for row in self.metrics if isinstance(row.get(key), (int, float))]
        known = [(step, value) for step, value in pairs if abs(value) <= sys.float_info.max]
        return np.array([s for s, _ in known], dtype=np.int64), np.array([v for _, v in known], dtype=np.float64)

    @cached_property
    def frequencies(self) -> FrequencyTable | None:
        """The learned table of the finished run; None for a run without CLEX."""
        path = self.folder / FINAL / TABLE
        return FrequencyTable.load(path) if path.is_file() else None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, commit, versions and machine of the run's start; empty without the file."""
        path = self.folder / ENVIRONMENT
        if not path.exists():
            return {}
        try:
            content: dict[str, Any] = read_json(path, within=self.folder)
            decode(content, _Environment, path)
        except BadFile:
            logger.warning("%s: damaged, its contents are left out", path)
            return {}
        return content

    @cached_property
    def last_step(self) -> int | None:
        """The step after which `final/` was written; None without a config."""
        path = self.folder / CONFIG
        return saved_config.over_defaults(path)["optim"]["steps"] if path.exists() else None

    @cached_property
    def final_hash(self) -> str | None:
        """Hash of the final weights; None while there are none."""
        return weights_hash(self.folder / FINAL)


@dataclass(frozen=True)
class TaskScores:
    """Scores of one method in one retrieval task."""

    label: str
    task: str
    rows: list[TaskScore]
    """A cell each: length, depth where the task has one, prompts answered."""
    path: Path
    origin: Origin


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows."""

    tables: list[Table]
    tasks: list[TaskScores]
    runs: list[TrainingRun]


def collect(arguments: Sequence[Path], baseline: str | None = None) -> Evidence:
    """Read run folders and evaluation files; `ConfigError` names an unusable one and the remedy.

    `baseline` is the evaluation file of the base, against which the tables show the short-context tax.
    """
    paths = list(dict.fromkeys(path for argument in arguments for path in find_evaluations(argument)))
    files = {path: results.read(path) for path in paths}
    names = _names({path: origin.label for path, (_, origin) in files.items()})
    rows: list[Row] = []
    tasks: list[TaskScores] = []
    for path, (result, origin) in files.items():
        prefix = f"{names[path]}: " if len(files) > 1 else ""
        rows += rows_of(path, result, prefix)
        tasks += _tasks(path, result, origin, prefix)
    # A baseline that is named here replaces that of each file.
    tables = read_tables(rows, partial(tax.add, path=baseline))
    return Evidence(tables, tasks, find_runs(paths))


def from_rows(rows: Sequence[Row]) -> Evidence:
    """Collect the evidence of rows with given labels; retrieval tasks and runs are those of the rows' files."""
    paths = list(dict.fromkeys(row.path for row in rows))
    prefixes = {path: f"{name}: " if len(paths) > 1 else "" for path, name in _names(dict.fromkeys(paths, "")).items()}
    tasks = [task for path in paths for task in _tasks(path, *results.read(path), prefixes[path])]
    return Evidence(read_tables(rows), tasks, find_runs(paths))


def find_evaluations(argument: Path) -> list[Path]:
    """Expand an argument to evaluation files: itself, or a finished run's newest and all others of its weights."""
    newest = find_evaluation(argument)
    if newest == argument:
        return [newest]
    weights = results.read(newest)[1].model.get("hash")
    others = [path for path in newest.parent.glob("*.json") if path != newest and weights and _hash(path) == weights]
    return sorted([newest, *others], key=lambda path: (len(path.name), path.name))


def _hash(path: Path) -> Any:
    """Read the hash of the weights of an evaluation file; None if it has none or cannot be read."""
    try:
        return results.read(path)[1].model.get("hash")
    except InputError:
        return None


def find_evaluation(argument: Path) -> Path:
    """Return the evaluation file of an argument: itself, or a finished run's newest."""
    if argument.is_file():
        return argument
    if not argument.is_dir():
        raise ConfigError(argument, None, "no such run folder or evaluation file; give the output_dir of a run")
    found = sorted((argument / EVALUATIONS).glob("*.json"), key=lambda path: (path.lstat().st_mtime, path.name))
    if (argument / CONFIG).is_file() and not (argument / FINAL).is_dir():
        instead = f", or name one of its evaluations: {found[-1]}" if found else ""
        raise ConfigError(
            argument, None, f"not finished (no final/); start the same training command again, it continues{instead}"
        )
    if not found:
        raise ConfigError(
            argument, None, f"no evaluation in it; run python -m clex_train.cli.evaluate run={argument} first"
        )
    return found[-1]


def find_runs(evaluations: Sequence[Path]) -> list[TrainingRun]:
    """Find the folders of the evaluation files that have records of a training run."""
    folders = [run_folder(path) for path in evaluations]
    known = [folder for folder in dict.fromkeys(folders) if (folder / METRICS).is_file() or (folder / FINAL).is_dir()]
    return [TrainingRun(name, folder) for folder, name in _shortest({folder: folder.parts for folder in known}).items()]


def run_folder(evaluation: Path) -> Path:
    """Return the run folder of an evaluation file; the file's own folder if it is not in a run."""
    return evaluation.parent.parent if evaluation.parent.name == EVALUATIONS else evaluation.parent


def _tasks(path: Path, result: Results, origin: Origin, prefix: str) -> list[TaskScores]:
    """Group the retrieval scores of an evaluation by task and method."""
    grouped: dict[tuple[str, str], list[TaskScore]] = {}
    for row in result.tasks:
        grouped.setdefault((row.task, row.method), []).append(row)
    return [TaskScores(prefix + method, task, rows, path, origin) for (task, method), rows in grouped.items()]


def _rows(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics; damaged lines are counted in a warning, except an unfinished last line."""
    rows, damaged, size = [], 0, 0
    with open_regular(path, within=folder) as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            if (row := parse(line)) is not None:
                rows.append(row)
                continue
            damaged, size = damaged + line.endswith(b"\n"), size + len(line)
            # Anything may stand under this name, such as a sparse file larger than the disk.
            if size > MOST_DAMAGED:
                most = MOST_DAMAGED >> 20
                logger.warning("%s: more than %d MiB of it cannot be read; the rest is left out", path, most)
                return rows
    if damaged:
        logger.warning("%s: lines that cannot be read are left out: %d", path, damaged)
    return rows


def _names(labels: dict[Path, str]) -> dict[Path, str]:
    """Name each evaluation file: by its label, or for repeated labels by the shortest distinct part of the path."""
    if len(set(labels.values())) == len(labels):
        return labels
    by_run = {path: run_folder(path).parts for path in labels}
    if len(set(by_run.values())) == len(labels):
        return _shortest(by_run)
    by_file = {path: label if label == path.stem else f"{label}/{path.stem}" for path, label in labels.items()}
    if len(set(by_file.values())) == len(labels):
        return by_file
    return _shortest({path: (*parts, path.stem) for path, parts in by_run.items()})


def _shortest(parts: dict[Path, tuple[str, ...]]) -> dict[Path, str]:
    """Return the shortest distinct ends of paths, all with the same number of parts."""
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(parts_of[-count:]) for path, parts_of in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in parts}


@dataclass(frozen=True)
class Source:
    """Facts needed to reproduce a table's row or a figure, in display order: of one evaluation or one run."""

    title: str
    facts: tuple[tuple[str, str], ...]


def evaluation_source(path: Path, origin: Origin, runs: Sequence[TrainingRun] = ()) -> Source:
    """List the facts of an evaluation file; weights at the last step of one of `runs` have the hash of its `final/`."""
    environment = dict(origin.environment)
    facts = {
        "file": str(path),
        "command": shlex.join(origin.command),
        "weights": _weights(path, origin.model, runs),
        "data": f"{origin.data.get('path', UNKNOWN)}, fingerprint {origin.data.get('fingerprint', UNKNOWN)}",
        "commit": str(environment.pop("git_commit", None) or UNKNOWN),
        "hardware": _hardware(environment),
        "versions": _listed(environment),
    }
    return Source(f"evaluation {origin.label}", tuple(facts.items()))


def training_source(run: TrainingRun) -> Source:
    """List the facts of a training run."""
    environment = dict(run.environment)
    facts = {
        "folder": str(run.folder),
        "command": shlex.join(environment.get("command") or [UNKNOWN]),
        "weights": f"{run.folder / FINAL}, hash {run.final_hash or UNKNOWN}",
        "data": f"fingerprint {environment.get('data_fingerprint', UNKNOWN)}",
        "commit": str(environment.get("git_commit") or UNKNOWN),
        "hardware": _hardware(environment),
        "versions": _listed({"python": environment.get("python"), **environment.get("packages", {})}),
    }
    return Source(f"training {run.label}", tuple(facts.items()))


def _weights(path: Path, model: dict[str, Any], runs: Sequence[TrainingRun]) -> str:
    parts = [str(model.get("path", UNKNOWN))]
    parts += [f"{key} {model[key]}" for key in ("step", "revision") if model.get(key) is not None]
    known = model.get("hash") or next((run.final_hash for run in runs if _is_last_step(path, model, run)), None)
    return ", ".join([*parts, f"hash {known or UNKNOWN}"])


def _is_last_step(path: Path, model: dict[str, Any], run: TrainingRun) -> bool:
    """Return True if an evaluation in a run's folder scored the weights in its `final/`."""
    return run_folder(path) == run.folder and "step" in model and model["step"] == run.last_step


def _hardware(environment: dict[str, Any]) -> str:
    """Remove device, number of ranks and platform from the environment, and join them."""
    device, ranks = environment.pop("device", UNKNOWN), environment.pop("world_size", None)
    words = [str(device), f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "", environment.pop("platform", "")]
    return ", ".join(filter(None, words))


def _listed(versions: dict[str, Any]) -> str:
    return ", ".join(_pairs(versions)) or UNKNOWN


def _pairs(versions: dict[str, Any]) -> Iterator[str]:
    for name, value in versions.items():
        if isinstance(value, (str, int, float)):
            yield f"{name} {value}"
