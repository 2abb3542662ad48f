"""LongBench, RULER and any other task of the `lm-eval` package on a trained model, with its own frequencies.

    python -m clex_train.cli.lm_eval run=runs/llama2_7b_clex tasks=[longbench_qasper,longbench_hotpotqa]
    python -m clex_train.cli.lm_eval model=DIR_OR_HUB_NAME tasks=[niah_single_1,ruler_vt] lengths=[4096,16384]
    python -m clex_train.cli.lm_eval run=runs/tiny_clex tasks=[my_task] include=folder/of/yaml limit=20
    deepspeed --module clex_train.cli.lm_eval run=runs/llama2_70b_clex tasks=[longbench] sharded=true

Needs `pip install -r requirements-eval.txt`. Writes `evaluation/lm_eval/<label>.json` in the run folder (or `output`).
What that file holds of other weights, tasks or settings stays: the new one is `<label>_2.json` then. An interrupted
evaluation goes on when the same command is given again; `dry_run=true` only says what it takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

import torch

from clex_train.cli import forecast, loading
from clex_train.cli.forecast import Amount
from clex_train.cli.keys import METHOD_KEYS, LoadingConfig
from clex_train.cli.loading import Source
from clex_train.config.bos import Bos
from clex_train.config.docs import with_overrides
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.data.bos import adds_bos
from clex_train.evaluation import harness, methods
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.results import FORMAT, Origin
from clex_train.evaluation.runner import keeping_table, work_of
from clex_train.models import architecture
from clex_train.models.load import LoadedModel
from clex_train.models.tokenizer import load_tokenizer
from clex_train.retrieval.plan import require_chat_template
from clex_train.rope.native import native_handle_on_meta
from clex_train.token_store.vocabulary import check_ids
from clex_train.tracking.summary import labelled
from clex_train.utils import distributed, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most
from clex_train.utils.files import make_folder, write_atomically

MOST = {
    "lengths": MOST_TOKENS,
    "max_length": MOST_TOKENS,
    "batch_size": 2**20,
    "num_fewshot": 10**4,
    "limit": 10**9,
}
"""Bounds of numbers that nobody can mean to exceed."""
KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples")
TASK_FILES = ("**/*.yaml", "**/*.py", "**/*.json", "**/*.jsonl")
"""Tasks of one's own and, where they lie beside them, their data."""


logger = log.get(__name__)


@dataclass
class LmEvalArguments(LoadingConfig):
    """Arguments of the program that runs tasks of lm-eval, without those of scaling methods."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks, groups or tags, or patterns such as `longbench_*`."""
    include: str | None = None
    """Folder with task files (YAML) of your own."""
    lengths: list[int] | None = None
    """Lengths in tokens of tasks that are made at any length (RULER); by default the task's own."""
    max_length: int | None = None
    """Most tokens of prompt and answer; longer prompts lose their beginning. By default t_max * L (L without CLEX)."""
    batch_size: int = 1
    """Prompts in a forward. They share one t, that of the longest; with 1 each has its own."""
    num_fewshot: int | None = None
    """Examples before each question; by default the task's own."""
    bos: Bos = Bos.auto
    """BOS at the beginning of prompts. `auto`: as the tokenizer does, and the harness for it."""
    limit: int | None = None
    """Only the first documents of each task."""
    chat_template: bool = False
    """Prompts are turns in the chat template of the tokenizer, for instruct models."""

    @property
    def named_methods(self) -> list[Method] | None:
        """Methods to compare; None for the model as it is."""
        return self.given(("methods",)).get("methods")


LmEvalConfig = with_overrides(LmEvalArguments, EvaluationConfig, METHOD_KEYS)


@log.buffered()
def main() -> None:
    """Run the tasks; names, data and bounds are checked before weights are read."""
    asked: LmEvalArguments = arguments_of.parse(LmEvalConfig, sys.argv[1:])
    with arguments_of.named_as_typed(asked):
        check(asked)
        _run(asked)


def _run(asked: LmEvalArguments) -> None:
    harness.require_installed()
    if asked.run:
        loading.run_config(Path(asked.run))
    source = loading.locate(asked)
    # Refuses a tokenizer with Python code of its own, which tasks such as RULER's would run without asking.
    tokenizer = load_tokenizer(asked.path, source.model)
    check_ids(tokenizer, architecture.embedding_rows(architecture.to_read(source.model)), asked.path)
    max_length = longest(asked, source)
    require(
        asked.bos is not Bos.always or adds_bos(tokenizer),
        "bos",
        asked.bos.value,
        "the harness puts BOS where the tokenizer does, and this one puts none; leave the key out",
    )
    if asked.chat_template:
        require_chat_template(tokenizer)
    spec = _spec(asked, source, max_length)
    metadata: dict[str, Any] = {"tokenizer": asked.path, "pretrained": asked.path}
    if asked.lengths:
        metadata["max_seq_lengths"] = asked.lengths
    tasks = harness.Tasks(asked.tasks, Path(asked.include) if asked.include else None, metadata)
    loading.say_what_is_ahead("lm_eval", asked, source, [labelled("tasks", _tasks(asked, tasks, max_length))])
    loaded, dtype = loading.load(asked, source.model)
    settings = harness.RequestSettings(
        max_length,
        asked.batch_size,
        asked.limit,
        asked.num_fewshot,
        bos=False if asked.bos is Bos.never else None,
        in_chat=asked.chat_template,
    )
    if asked.dry_run:
        _say_amount(asked, loaded, harness.count(loaded, tasks, settings))
        return
    file = source.output if asked.output else source.output.parent / "lm_eval" / source.output.name
    origin = facts(asked, source, tasks, dtype, max_length)
    kept = loading.partial_of(asked, source.model, file, origin, {"lm_eval": version("lm_eval")})
    found = list(evaluate(asked, loaded, spec, tasks, settings, kept))
    if distributed.is_main():
        text = "\n".join(filter(None, map(table, found)))
        loading.keep(asked, file, origin, text, partial(write, found=found, origin=origin))
    kept.remove()


class Found(NamedTuple):
    """The harness's results on a model as it is, or by a method."""

    method: str
    """Empty for the model as it is."""
    frequencies: str
    results: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return values by key."""
        return harness.metrics(self.results, self.method)


def evaluate(
    asked: LmEvalArguments,
    loaded: LoadedModel,
    spec: EvaluationConfig,
    tasks: harness.Tasks,
    settings: harness.RequestSettings,
    kept: Partial,
) -> Iterator[Found]:
    """Ask the tasks of the model as it is, or with each of the methods that are named. Collective."""
    if asked.named_methods is None:
        results = harness.evaluate(loaded, tasks, settings, kept)
        yield _without_not_run(Found("", loaded.table.method if loaded.table is not None else "none", results))
        return
    inserted = methods.insertions(spec, loaded.model, loaded.context_len)
    for name, frequencies in methods.of_model(spec, loaded).items():
        with keeping_table(loaded.handle), inserted.get(name, nullcontext)():
            loaded.handle.use(frequencies)
            results = harness.evaluate(loaded, tasks, settings, kept, name)
        yield _without_not_run(Found(name, frequencies.method, results))


def _say_amount(asked: LmEvalArguments, loaded: LoadedModel, counted: harness.Counted) -> None:
    """Print what the tasks take. A prompt is read by one forward, and so is every token that is generated."""
    num_methods = len(asked.named_methods or [None])
    amount = Amount(
        cells=num_methods * counted.tasks,
        forwards=num_methods * (len(counted.prompts) + counted.generated),
        tokens=num_methods * (sum(counted.prompts) + counted.generated),
        work=num_methods * sum(work_of(loaded.model, length) for length in counted.prompts),
        decoded=num_methods * counted.generated,
        cached=asked.batch_size * max(counted.prompts, default=0) if counted.generated else 0,
        longest=max(counted.prompts, default=0),
    )
    forecast.say(loaded, amount, forecast.MOST_TIMED, False, asked.sharded)


def _without_not_run(found: Found) -> Found:
    not_run = harness.take_out_not_run(found.results)
    if not_run and distributed.is_main():
        logger.info("not run, and left out: %s", ", ".join(not_run))
    return found


def _spec(asked: LmEvalArguments, source: Source, max_length: int) -> EvaluationConfig:
    """Return the methods and what they take; `ConfigError` for one that the model cannot have."""
    spec = EvaluationConfig(**asked.given(METHOD_KEYS), lengths=[max_length])
    arch = architecture.to_read(source.model)
    unloaded = native_handle_on_meta(arch, source.context_len, source.model.trust_remote_code)
    path = str(source.model.path)
    methods.check(spec, unloaded, architecture.has_field(path), architecture.grid_of_field(path))
    return spec


def _tasks(asked: LmEvalArguments, tasks: harness.Tasks, max_length: int) -> str:
    limit = f", the first {asked.limit} documents of each" if asked.limit else ""
    return f"{', '.join(sorted(tasks.names))}: prompts and answers of up to {max_length:,} tokens{limit}"


def check(asked: LmEvalArguments) -> None:
    """Refuse by `ConfigError` keys that are missing, out of range or contradict each other."""
    loading.check(asked)
    require_at_most(asked, "", MOST)
    require(all(n >= 2 for n in asked.lengths or ()), "lengths", asked.lengths, "lengths of at least 2 tokens")
    require(len(asked.tasks) > 0, "tasks", asked.tasks, "one or more names, such as tasks=[longbench_qasper]")
    require(asked.include is None or Path(asked.include).is_dir(), "include", asked.include, "no such folder")
    require(asked.batch_size >= 1, "batch_size", asked.batch_size, "at least 1 prompt")
    require(asked.limit is None or asked.limit >= 1, "limit", asked.limit, "at least 1 document")
    require(asked.num_fewshot is None or asked.num_fewshot >= 0, "num_fewshot", asked.num_fewshot, "0 or more")
    require(
        asked.sharded or distributed.world_size() == 1,
        "sharded",
        asked.sharded,
        f"{distributed.world_size()} ranks would each do the same; set sharded=true, or start one process",
    )
    said = asked.given(METHOD_KEYS)
    require(
        asked.named_methods is not None or not said,
        "methods",
        asked.named_methods,
        f"{next(iter(said), '')} goes with a method; name it, as in methods=[lm_infinite]",
    )
    # Bounds every number of a method, before the model is looked for.
    EvaluationConfig(**said)


def longest(asked: LmEvalArguments, source: Source) -> int:
    """Return the most tokens of a prompt and its answer; `ConfigError` beyond those that the field was trained for."""
    t_max = architecture.t_max_of_field(asked.path)
    reach = int((t_max or 1.0) * source.context_len)
    chosen = asked.max_length or reach
    require(chosen >= 2, "max_length", chosen, "at least 2 tokens")
    require(
        t_max is None
        or chosen <= reach
        or not {Method.trained, Method.clex} & {*(asked.named_methods or [Method.trained])},
        "max_length",
        chosen,
        f"beyond t_max * L = {t_max or 1:g} * {source.context_len}; leave the key out",
    )
    return chosen


def facts(asked: LmEvalArguments, source: Source, tasks: harness.Tasks, dtype: torch.dtype, max_length: int) -> Origin:
    """Record where the numbers come from; data that tasks fetch are known by the tasks' names alone."""
    path, environment, data = Path(str(source.model.path)), origins.environment(dtype), {}
    if asked.include:
        data = {"path": asked.include, "fingerprint": origins.files_hash(Path(asked.include), TASK_FILES)}
    shaping = {key: getattr(asked, key) for key in ("lengths", "batch_size", "num_fewshot", "limit")}
    shaping |= {} if asked.bos is Bos.auto else {"bos": asked.bos.value}
    shaping |= {"chat_template": True} if asked.chat_template else {}
    shaping |= json.loads(json.dumps(asked.given(METHOD_KEYS), default=lambda choice: choice.value))
    if "longrope_factors" in shaping:
        # The contents of the file shape the scores, not its name.
        shaping["longrope_factors"] = Path(shaping["longrope_factors"]).read_text(encoding="utf-8")
    return Origin(
        label=source.label,
        command=origins.command(),
        model={"path": str(path), "hash": origins.weights_hash(path), "revision": source.model.revision},
        data=data,
        environment=environment,
        request={
            "tasks": sorted(tasks.names),
            **shaping,
            "max_length": max_length,
            "context_len": source.context_len,
            "dtype": environment["dtype"],
        },
    )


def write(file: Path, found: Sequence[Found], origin: Origin) -> None:
    """Write the metrics by key, and the harness's own account of tasks, versions and examples, as JSON.

    `frequencies` and `lm_eval` are by method where methods were named.
    """
    accounts = {each.method: {key: each.results[key] for key in KEPT if key in each.results} for each in found}
    frequencies = {each.method: each.frequencies for each in found}
    content = {
        "format": FORMAT,
        **vars(origin),
        "context_len": origin.request["context_len"],
        "frequencies": frequencies.get("", frequencies),
        "max_length": origin.request["max_length"],
        "metrics": {key: value for each in found for key, value in each.metrics().items()},
        "lm_eval": accounts.get("", accounts),
    }
    make_folder(file.parent)
    write_atomically(file, json.dumps(content, indent=1, default=str) + "\n")


def table(found: Found) -> str:
    """Format one line a metric."""
    rows = found.metrics()
    width = max(map(len, rows), default=0)
    return "\n".join(f"{key:<{width}}  {value:.4f}" for key, value in rows.items())


def usage() -> str:
    """The module's own text and a line for every key."""
    return arguments_of.usage(__doc__, LmEvalConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="finished parts are kept, the same command goes on"))
