"""Where a number of the report comes from: the facts under which a table's row or a figure can be repeated."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_train.evaluation.report.evidence import TrainingRun, run_folder
from clex_train.evaluation.results import Origin
from clex_train.tracking.run_folder import FINAL

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Source:
    """One evaluation file or one training run, with its facts in the order in which they are shown."""

    title: str
    facts: tuple[tuple[str, str], ...]


def of_evaluation(path: Path, origin: Origin, runs: Sequence[TrainingRun] = ()) -> Source:
    """The facts of an evaluation file; weights at the last step of one of `runs` have the hash of its `final/`."""
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


def of_training(run: TrainingRun) -> Source:
    """The facts of a training run."""
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
    """Tell whether an evaluation in a run's folder scored the weights in its `final/`."""
    return run_folder(path) == run.folder and "step" in model and model["step"] == run.last_step


def _hardware(environment: dict[str, Any]) -> str:
    """The device, its number and the platform, taken out of the environment."""
    device, ranks = environment.pop("device", UNKNOWN), environment.pop("world_size", None)
    words = [str(device), f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "", environment.pop("platform", "")]
    return ", ".join(filter(None, words))


def _listed(versions: dict[str, Any]) -> str:
    return ", ".join(_pairs(versions)) or UNKNOWN


def _pairs(versions: dict[str, Any]) -> Iterator[str]:
    for name, value in versions.items():
        if isinstance(value, (str, int, float)):
            yield f"{name} {value}"
