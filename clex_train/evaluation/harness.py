"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`: LongBench, RULER, ...) on a model with our frequencies.

The harness gets the model object itself, so that every forward and every step of generation takes the t that its
length needs. Rows of one batch share a t, that of the longest: with `batch_size=1` each prompt has its own.
The package is optional and imported on use; only this file knows it.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clex_train import distributed
from clex_train.modeling import LoadedModel

NOT_RUN = -1
"""What lm-eval's tasks at several lengths score for a length without prompts."""


def require_installed() -> None:
    """`ValueError` naming the remedy when lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install -r requirements-eval.txt")


class Tasks:
    """Tasks with their data, read before any weights are.

    `names` may hold patterns (`longbench_*`), `include` is a folder of task files of one's own, `metadata` what tasks
    are made with (RULER: `max_seq_lengths` and the `tokenizer` that counts them). `ValueError` for a name that is
    unknown and for data that cannot be had.
    """

    def __init__(self, names: Sequence[str], include: Path | None, metadata: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        # Every task that it passes over would be told of at level INFO.
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.manager = TaskManager(include_path=include, metadata=dict(metadata))
        for name in names:
            if not self.manager.match_tasks([name]):
                raise ValueError(
                    f"tasks=[{name}]: lm-eval has no such task; `lm-eval ls tasks` lists them, and include=FOLDER "
                    "adds task files of your own"
                )
        self.names = self.manager.match_tasks(list(names))
        self.loaded = _load(self.manager, self.names)

    def load(self, _: object) -> Any:
        """What the harness asks a task manager for; the tasks as they were read."""
        return self.loaded


def evaluate(
    loaded: LoadedModel,
    tasks: Tasks,
    max_length: int,
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bos: bool | None = None,
) -> dict[str, Any]:
    """The harness's own results (`results`, `configs`, `versions`, ...). Collective when the weights are sharded.

    Prompts are cut on the left to `max_length` tokens with what is generated, as the harness does it; `limit` takes the
    first documents of each task. Then every rank computes the same. `bos=False` takes
    BOS off the prompts of a tokenizer that puts it there.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        backend="causal",
        add_bos_token=bos,
    )
    # That of the first parameter otherwise, which may wait in host memory.
    model._device = distributed.device()
    tasks.manager.load = tasks.load
    found: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        # Of metrics without a formula for their error; lm-eval's own 100,000 resamples take longer than small tasks.
        bootstrap_iters=1000,
        log_samples=False,
    )
    return distributed.broadcast_object(found)


def take_out_not_run(results: dict[str, Any]) -> list[str]:
    """Take lengths that no prompt had out of the results, which lm-eval marks by a score of -1; returns their names.

    RULER's tasks have a metric for each length, named by it, also for those that were not asked for.
    """
    names = []
    for group in ("results", "groups"):
        for task, row in results.get(group, {}).items():
            for metric in [metric for metric, value in row.items() if _is_not_run(metric, value)]:
                del row[metric]
                row.pop(metric.replace(",", "_stderr,"), None)
                names.append(f"{task}/{metric.partition(',')[0]}")
    return list(dict.fromkeys(names))


def _is_not_run(metric: str, value: object) -> bool:
    return metric.partition(",")[0].isdecimal() and value == NOT_RUN


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """`lm_eval/<task>/<metric>` -> value, standard errors as `lm_eval/<task>/<metric>_stderr`; filters by name."""
    found = {}
    for task, row in results["results"].items():
        for name, value in row.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, (int, float)):
                found[f"lm_eval/{task}/{metric}" + ("" if filtered == "none" else f"/{filtered}")] = float(value)
    return found


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"tasks=[{','.join(names)}]: a package is missing ({reason})") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tasks=[{','.join(names)}]: their data cannot be read ({reason}); without a network, fill the cache of "
            "datasets (HF_HOME) on a machine that has one"
        ) from error
