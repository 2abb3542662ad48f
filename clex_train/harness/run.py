"""Tasks of lm-eval by each method: the model's frequencies are swapped, the harness reads it, and they are put back.

Each task by each method is a cell, which is saved when it is finished (`harness.cells`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clex_train.evaluation import methods
from clex_train.evaluation.runner import keeping_table
from clex_train.harness import requests, scores
from clex_train.harness.cells import Cell, Cells
from clex_train.harness.scores import Found
from clex_train.utils import distributed, log

if TYPE_CHECKING:
    from clex_train.config.evaluation import EvaluationConfig
    from clex_train.evaluation.partial_results import Partial
    from clex_train.harness.tasks import Tasks
    from clex_train.models.load import LoadedModel

KEPT = ("results", "configs", "versions", "n-shot", "n-samples")
"""Parts of lm-eval's results that a cell has, each by task."""

logger = log.get(__name__)


@dataclass(frozen=True)
class Job:
    """An evaluation before weights are read."""

    names: Sequence[str]
    """Methods; `[""]` for the unchanged model."""
    spec: EvaluationConfig
    """Settings of the methods."""
    tasks: Tasks
    settings: requests.RequestSettings
    cells: Cells
    kept: Partial
    """Answers within a cell that was interrupted."""
    without_chat: Sequence[str] = ()
    """Tasks that are read without a chat template in any case."""


def evaluate(job: Job, load: Callable[[], LoadedModel]) -> list[Found]:
    """Compute the cells that are not finished, and return the scores by method. Collective.

    `load` reads the weights, and is called only if a cell is missing.
    """
    keys = [(name, task) for name in job.names for task in job.tasks.single]
    cells = {(name, task): cell for name, task in keys if (cell := job.cells.find(task, name)) is not None}
    if cells and distributed.is_main():
        logger.info("%d of %d cells are finished (%s)", len(cells), len(keys), job.cells.folder)
    missing = [key for key in keys if key not in cells]
    if missing:
        loaded = load()
        # Method by method: swapping frequencies is cheap, inserting a mask is not.
        for name in dict.fromkeys(name for name, _ in missing):
            wanted = [task for method, task in missing if method == name]
            cells |= {(name, cell.task): cell for cell in _by_method(job, loaded, name, wanted)}
    return [_found(job, name, [cells[name, task] for task in job.tasks.single]) for name in job.names]


def _by_method(job: Job, loaded: LoadedModel, name: str, tasks: Sequence[str]) -> list[Cell]:
    """Compute cells of one method; "" is the unchanged model."""
    if not name:
        own = loaded.table.method if loaded.table is not None else "none"
        return [_cell(job, loaded, task, name, own) for task in tasks]
    frequencies = methods.model_tables(job.spec, loaded)[name]
    inserted = methods.insertions(job.spec, loaded.model, loaded.context_len)
    with keeping_table(loaded.handle), inserted.get(name, nullcontext)():
        loaded.handle.use(frequencies)
        return [_cell(job, loaded, task, name, frequencies.method) for task in tasks]


def _cell(job: Job, loaded: LoadedModel, task: str, method: str, frequencies: str) -> Cell:
    in_chat = job.settings.in_chat and task not in job.without_chat
    settings = replace(job.settings, in_chat=in_chat)
    results, num_shortened = requests.evaluate(loaded, job.tasks, task, settings, job.kept, method)
    not_run = scores.remove_not_run(results)
    if not_run and distributed.is_main():
        logger.info("not run, and left out: %s", ", ".join(not_run))
    cell = Cell(
        task=task,
        method=method,
        frequencies=frequencies,
        results={key: results[key] for key in KEPT if key in results},
        num_prompts=int(results["n-samples"][task]["effective"]),
        num_shortened=num_shortened,
        environment=job.cells.environment,
    )
    if num_shortened and distributed.is_main():
        part = job.settings.truncation.value
        name = f"{method}/{task}" if method else task
        logger.info("%s: %d of %d prompts are cut (%s)", name, num_shortened, cell.num_prompts, part)
    job.cells.keep(cell)
    return cell


def _found(job: Job, method: str, cells: Sequence[Cell]) -> Found:
    """Merge the cells of a method, and add the scores of groups that were asked for."""
    results: dict[str, Any] = {key: _merged(cell.results.get(key, {}) for cell in cells) for key in KEPT}
    # lm-eval's own means of its groups, which it would compute in a run of all tasks at once.
    groups = job.tasks.aggregate(results["results"])
    results["results"] |= groups
    prompts = {cell.task: {"num": cell.num_prompts, "num_shortened": cell.num_shortened} for cell in cells}
    return Found(method, cells[0].frequencies, results | ({"groups": groups} if groups else {}), prompts)


def _merged(parts: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part
    return merged
