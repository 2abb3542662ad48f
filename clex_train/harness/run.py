"""Tasks of lm-eval by each method: the model's frequencies are swapped, the harness reads it, and they are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from clex_train.evaluation import methods
from clex_train.evaluation.runner import keeping_table
from clex_train.harness import requests, scores
from clex_train.harness.scores import Found
from clex_train.utils import distributed, log

if TYPE_CHECKING:
    from clex_train.config.evaluation import EvaluationConfig
    from clex_train.evaluation.partial_results import Partial
    from clex_train.harness.arguments import LmEvalArguments
    from clex_train.harness.tasks import Tasks
    from clex_train.models.load import LoadedModel

logger = log.get(__name__)


def evaluate(
    args: LmEvalArguments,
    loaded: LoadedModel,
    spec: EvaluationConfig,
    tasks: Tasks,
    settings: requests.RequestSettings,
    kept: Partial,
) -> Iterator[Found]:
    """Run the tasks on the unchanged model, or with each of the named methods. Collective."""
    if args.named_methods is None:
        results = requests.evaluate(loaded, tasks, settings, kept)
        yield _without_not_run(Found("", loaded.table.method if loaded.table is not None else "none", results))
        return
    inserted = methods.insertions(spec, loaded.model, loaded.context_len)
    for name, frequencies in methods.model_tables(spec, loaded).items():
        with keeping_table(loaded.handle), inserted.get(name, nullcontext)():
            loaded.handle.use(frequencies)
            results = requests.evaluate(loaded, tasks, settings, kept, name)
        yield _without_not_run(Found(name, frequencies.method, results))


def _without_not_run(found: Found) -> Found:
    not_run = scores.remove_not_run(found.results)
    if not_run and distributed.is_main():
        logger.info("not run, and left out: %s", ", ".join(not_run))
    return found
