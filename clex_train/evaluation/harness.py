"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`: LongBench, RULER, ...) on a model with our frequencies.

The harness gets the model object itself, so that every forward and every step of generation takes the t that its
length needs. Rows of one batch share a t, that of the longest: with `batch_size=1` each prompt has its own.
The package is optional and imported on use; only this file knows it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from clex_train.evaluation.partial_results import Partial
from clex_train.models.load import LoadedModel
from clex_train.utils import distributed, log, progress, seeding
from clex_train.utils.errors import ConfigError

NOT_RUN = -1
"""What lm-eval's tasks at several lengths score for a length without prompts."""
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
BATCHES = 8
"""Batches of a group, which the harness sorts by length."""

logger = log.get(__name__)


def require_installed() -> None:
    """`ValueError` naming the remedy when lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed", None, "pip install -r requirements-eval.txt")


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
                raise ConfigError(
                    "tasks",
                    f"[{name}]",
                    "lm-eval has no such task; `lm-eval ls tasks` lists them, and include=FOLDER "
                    "adds task files of your own",
                )
        self.names = self.manager.match_tasks(list(names))
        self.loaded = _load(self.manager, self.names)

    def load(self, _: object) -> Any:
        """What the harness asks a task manager for; the tasks as they were read."""
        return self.loaded


@dataclass(frozen=True)
class Asking:
    """How tasks are asked."""

    max_length: int
    """Tokens of a prompt with what is generated; longer prompts lose their beginning, as the harness does it."""
    batch_size: int = 1
    limit: int | None = None
    """Only the first documents of each task."""
    num_fewshot: int | None = None
    bos: bool | None = None
    """False takes BOS off the prompts of a tokenizer that puts it there."""
    in_chat: bool = False
    """Prompts are turns in the tokenizer's chat template."""


def evaluate(
    loaded: LoadedModel, tasks: Tasks, asking: Asking, kept: Partial | None = None, method: str = ""
) -> dict[str, Any]:
    """Run the harness and return its own results (`results`, `configs`, `versions`, ...).

    Collective when the weights are sharded. Every rank computes the same. `kept` is what an interrupted evaluation has
    finished, of each `method` by its name.
    """
    model = _model(loaded, asking)
    for kind in KINDS:
        setattr(model, kind, InGroups(kind, getattr(model, kind), kept or Partial(), method, asking.batch_size))
    return distributed.broadcast_object(_simple_evaluate(model, tasks, asking))


@dataclass
class Counted:
    """What tasks ask, without an answer."""

    tasks: int = 0
    prompts: list[int] = field(default_factory=list)
    """Tokens of each, as far as the model reads them."""
    generated: int = 0
    """Tokens that are generated after the first, at most."""


def count(loaded: LoadedModel, tasks: Tasks, asking: Asking) -> Counted:
    """Count what `evaluate` would ask; no forward is made."""
    model, counted = _model(loaded, asking), Counted()

    def without_answers(kind: str, nothing: object) -> Callable[..., list[object]]:
        def answer(requests: Sequence[Any], disable_tqdm: bool = False) -> list[object]:
            for request in requests:
                more = int(request.args[1].get("max_gen_toks", model.max_gen_toks)) if kind == KINDS[2] else 0
                text = request.args[0] + (request.args[1] if kind == KINDS[0] else "")
                num_tokens, most = len(model.tok_encode(text)), asking.max_length - more
                # Rolling windows of a long document overlap by a token.
                pieces = -(-num_tokens // most) if kind == KINDS[1] else 1
                counted.prompts += [min(num_tokens, most)] * pieces
                counted.generated += max(0, more - 1)
            return [nothing] * len(requests)

        return answer

    for kind, nothing in zip(KINDS, ((0.0, False), 0.0, ""), strict=True):
        setattr(model, kind, without_answers(kind, nothing))
    counted.tasks = len(_simple_evaluate(model, tasks, asking)["configs"])
    return counted


def _model(loaded: LoadedModel, asking: Asking) -> Any:
    """Make the harness's own model around ours."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=asking.max_length,
        batch_size=asking.batch_size,
        backend="causal",
        add_bos_token=asking.bos,
    )
    # That of the first parameter otherwise, which may wait in host memory.
    model._device = distributed.device()
    return model


def _simple_evaluate(model: Any, tasks: Tasks, asking: Asking) -> Any:
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks.manager.load = tasks.load
    return simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        num_fewshot=asking.num_fewshot,
        limit=asking.limit,
        # Of metrics without a formula for their error; lm-eval's own 100,000 resamples take longer than small tasks.
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=asking.in_chat,
    )


class InGroups:
    """A kind of request of the harness's model, in groups that are kept as they are answered.

    A group is the requests of one document, with batches several of them, so that an interruption changes no batch.
    Its key has a hash of the requests: where a task's data have changed, nothing is taken over.
    """

    def __init__(
        self, kind: str, answer: Callable[..., list[Any]], kept: Partial, method: str, batch_size: int
    ) -> None:
        self.kind, self._answer, self._kept = kind, answer, kept
        self._prefix = f"{method or 'model'}/{kind}"
        self._least = batch_size if batch_size == 1 else BATCHES * batch_size

    def __call__(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return the answers in the order of the requests."""
        todo = {f"{self._prefix}/{i}/{_digest(group)}": group for i, group in enumerate(groups(requests, self._least))}
        found = {key: answers[0] for key in todo if (answers := self._kept.find([key], _answers))}
        self._say_found(requests, todo, found)
        with progress.bar(len(requests), f"lm_eval {self._prefix}", is_shown=distributed.is_main(), unit="req") as bar:
            for number, (key, group) in enumerate(todo.items()):
                if key not in found:
                    # Sampled answers then do not depend on how many there were before.
                    torch.manual_seed(seeding.torch_seed(0, self._prefix, number))
                    found[key] = self._answer(group, disable_tqdm=True)
                    self._kept.finish({key: found[key]}, at_once=False)
                bar.update(len(group))
        return [answer for key in todo for answer in found[key]]

    def _say_found(self, requests: Sequence[Any], todo: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        left = [key for key in self._kept.cells if key.startswith(f"{self._prefix}/")]
        if not left or not distributed.is_main():
            return
        number = sum(len(todo[key]) for key in found)
        others = len(left) - len(found)
        unused = f"; {others} groups of other requests are not used: the tasks' data have changed" if others else ""
        logger.info(
            "%s: %d of %d requests found from an interrupted evaluation (%s)%s",
            self._prefix,
            number,
            len(requests),
            self._kept.path,
            unused,
        )


def groups(requests: Sequence[Any], least: int) -> list[list[Any]]:
    """Put the requests into groups of at least so many (but for the last); those of a document stay together."""
    found: list[list[Any]] = []
    for _, of_document in groupby(requests, key=lambda request: (request.task_name, request.doc_id)):
        if not found or len(found[-1]) >= least:
            found.append([])
        found[-1].extend(of_document)
    return found


def _digest(group: Sequence[Any]) -> str:
    content = json.dumps([request.args for request in group], default=str)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _answers(kept: Any) -> list[Any]:
    """Return the answers of a group as the harness makes them: log-likelihoods are pairs."""
    return [tuple(answer) if isinstance(answer, list) else answer for answer in kept]


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


def metrics(results: Mapping[str, Any], method: str = "") -> dict[str, float]:
    """Map `lm_eval/<task>/<metric>` to its value, standard errors as `lm_eval/<task>/<metric>_stderr`; filters by name.

    With a method `lm_eval/<task>/<method>/<metric>`.
    """
    found, by = {}, f"{method}/" if method else ""
    for task, row in results["results"].items():
        for name, value in row.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, (int, float)):
                found[f"lm_eval/{task}/{by}{metric}" + ("" if filtered == "none" else f"/{filtered}")] = float(value)
    return found


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError("tasks", f"[{','.join(names)}]", f"a package is missing ({reason})") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            "tasks",
            f"[{','.join(names)}]",
            f"their data cannot be read ({reason}); without a network, fill the cache of "
            "datasets (HF_HOME) on a machine that has one",
        ) from error
