"""LongBench, RULER and any other task of the `lm-eval` package on a trained model, with its own frequencies.

    python -m clex_train.cli.lm_eval run=runs/llama2_7b_clex tasks=[longbench_qasper,longbench_hotpotqa]
    python -m clex_train.cli.lm_eval model=DIR_OR_HUB_NAME tasks=[niah_single_1,ruler_vt] lengths=[4096,16384]
    python -m clex_train.cli.lm_eval run=runs/tiny_clex tasks=[my_task] include=folder/of/yaml limit=20
    deepspeed --module clex_train.cli.lm_eval run=runs/llama2_70b_clex tasks=[longbench] sharded=true

Needs `pip install -r requirements-eval.txt`. Writes `evaluation/lm_eval/<label>.json` in the run folder (or `output`).
An existing file of other weights, tasks or settings is kept, and the new one is `<label>_2.json`. The same command
resumes an interrupted evaluation; `dry_run=true` only estimates its cost.
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

from clex_train.cli import loading
from clex_train.cli.load_model import load
from clex_train.cli.loading import Source
from clex_train.config.bos import Bos
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.console.keys import METHOD_KEYS, LoadingConfig, with_overrides
from clex_train.data.bos import adds_bos
from clex_train.evaluation import harness, methods
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.results import FORMAT, Origin
from clex_train.evaluation.runner import keeping_table, work_of
from clex_train.models import architecture
from clex_train.models.load import LoadedModel
from clex_train.models.tokenizer import load_tokenizer
from clex_train.preflight import evaluation_time
from clex_train.preflight.evaluation_time import Amount
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
"""Largest sensible values."""
KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples")
TASK_FILES = ("**/*.yaml", "**/*.py", "**/*.json", "**/*.jsonl")
"""Files of the user's own tasks, and their data in the same folder."""


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
    """BOS at the beginning of prompts. `auto`: as the tokenizer does by default."""
    limit: int | None = None
    """Only the first documents of each task."""
    chat_template: bool = False
    """Prompts are turns in the chat template of the tokenizer, for instruct models."""

    @property
    def named_methods(self) -> list[Method] | None:
        """Methods to compare; None for the unchanged model."""
        return self.given(("methods",)).get("methods")


LmEvalConfig = with_overrides(LmEvalArguments, EvaluationConfig, METHOD_KEYS)


@log.buffered()
def main() -> None:
    """Run the tasks; names, data and bounds are checked before weights are read."""
    args: LmEvalArguments = arguments_of.parse(LmEvalConfig, sys.argv[1:])
    with arguments_of.named_as_typed(args):
        check(args)
        _run(args)


def _run(args: LmEvalArguments) -> None:
    harness.require_installed()
    if args.run:
        loading.run_config(Path(args.run))
    source = loading.locate(args)
    # Refuses a tokenizer with Python code of its own, which tasks such as RULER's would run without asking.
    tokenizer = load_tokenizer(args.path, source.model)
    check_ids(tokenizer, architecture.embedding_rows(architecture.to_read(source.model)), args.path)
    max_length = longest(args, source)
    require(
        args.bos is not Bos.always or adds_bos(tokenizer),
        "bos",
        args.bos.value,
        "the harness follows the tokenizer, which adds no BOS; leave the key out",
    )
    if args.chat_template:
        require_chat_template(tokenizer)
    spec = _spec(args, source, max_length)
    metadata: dict[str, Any] = {"tokenizer": args.path, "pretrained": args.path}
    if args.lengths:
        metadata["max_seq_lengths"] = args.lengths
    tasks = harness.Tasks(args.tasks, Path(args.include) if args.include else None, metadata)
    loading.print_plan("lm_eval", args, source, [labelled("tasks", _tasks(args, tasks, max_length))])
    loaded, dtype = load(args, source.model)
    settings = harness.RequestSettings(
        max_length,
        args.batch_size,
        args.limit,
        args.num_fewshot,
        bos=False if args.bos is Bos.never else None,
        in_chat=args.chat_template,
    )
    if args.dry_run:
        _print_amount(args, loaded, harness.count(loaded, tasks, settings))
        return
    file = source.output if args.output else source.output.parent / "lm_eval" / source.output.name
    origin = facts(args, source, tasks, dtype, max_length)
    kept = loading.resume_partial(args, source.model, file, origin, {"lm_eval": version("lm_eval")})
    found = list(evaluate(args, loaded, spec, tasks, settings, kept))
    if distributed.is_main():
        text = "\n".join(filter(None, map(table, found)))
        loading.write_results(args, file, origin, text, partial(write, found=found, origin=origin))
    kept.remove()


class Found(NamedTuple):
    """The harness's results on the unchanged model, or by a method."""

    method: str
    """Empty for the unchanged model."""
    frequencies: str
    results: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return values by key."""
        return harness.metrics(self.results, self.method)


def evaluate(
    args: LmEvalArguments,
    loaded: LoadedModel,
    spec: EvaluationConfig,
    tasks: harness.Tasks,
    settings: harness.RequestSettings,
    kept: Partial,
) -> Iterator[Found]:
    """Run the tasks on the unchanged model, or with each of the named methods. Collective."""
    if args.named_methods is None:
        results = harness.evaluate(loaded, tasks, settings, kept)
        yield _without_not_run(Found("", loaded.table.method if loaded.table is not None else "none", results))
        return
    inserted = methods.insertions(spec, loaded.model, loaded.context_len)
    for name, frequencies in methods.model_tables(spec, loaded).items():
        with keeping_table(loaded.handle), inserted.get(name, nullcontext)():
            loaded.handle.use(frequencies)
            results = harness.evaluate(loaded, tasks, settings, kept, name)
        yield _without_not_run(Found(name, frequencies.method, results))


def _print_amount(args: LmEvalArguments, loaded: LoadedModel, counted: harness.Counted) -> None:
    """Print the cost of the tasks: one forward for each prompt, and one for each generated token."""
    num_methods = len(args.named_methods or [None])
    amount = Amount(
        cells=num_methods * counted.tasks,
        forwards=num_methods * (len(counted.prompts) + counted.generated),
        tokens=num_methods * (sum(counted.prompts) + counted.generated),
        work=num_methods * sum(work_of(loaded.model, length) for length in counted.prompts),
        decoded=num_methods * counted.generated,
        cached=args.batch_size * max(counted.prompts, default=0) if counted.generated else 0,
        longest=max(counted.prompts, default=0),
    )
    evaluation_time.print_forecast(loaded, amount, evaluation_time.MOST_TIMED, False, args.sharded)


def _without_not_run(found: Found) -> Found:
    not_run = harness.remove_not_run(found.results)
    if not_run and distributed.is_main():
        logger.info("not run, and left out: %s", ", ".join(not_run))
    return found


def _spec(args: LmEvalArguments, source: Source, max_length: int) -> EvaluationConfig:
    """Return the methods with their settings; `ConfigError` for one that does not fit the model."""
    spec = EvaluationConfig(**args.given(METHOD_KEYS), lengths=[max_length])
    arch = architecture.to_read(source.model)
    unloaded = native_handle_on_meta(arch, source.context_len, source.model.trust_remote_code)
    path = str(source.model.path)
    methods.check(spec, unloaded, architecture.has_field(path), architecture.grid_of_field(path))
    return spec


def _tasks(args: LmEvalArguments, tasks: harness.Tasks, max_length: int) -> str:
    limit = f", the first {args.limit} documents of each" if args.limit else ""
    return f"{', '.join(sorted(tasks.names))}: prompts and answers of up to {max_length:,} tokens{limit}"


def check(args: LmEvalArguments) -> None:
    """Raise `ConfigError` for keys that are missing, out of range or contradict each other."""
    loading.check(args)
    require_at_most(args, "", MOST)
    require(all(n >= 2 for n in args.lengths or ()), "lengths", args.lengths, "lengths of at least 2 tokens")
    require(len(args.tasks) > 0, "tasks", args.tasks, "one or more names, such as tasks=[longbench_qasper]")
    require(args.include is None or Path(args.include).is_dir(), "include", args.include, "no such folder")
    require(args.batch_size >= 1, "batch_size", args.batch_size, "at least 1 prompt")
    require(args.limit is None or args.limit >= 1, "limit", args.limit, "at least 1 document")
    require(args.num_fewshot is None or args.num_fewshot >= 0, "num_fewshot", args.num_fewshot, "0 or more")
    require(
        args.sharded or distributed.world_size() == 1,
        "sharded",
        args.sharded,
        f"{distributed.world_size()} ranks would each do the same; set sharded=true, or start one process",
    )
    given = args.given(METHOD_KEYS)
    require(
        args.named_methods is not None or not given,
        "methods",
        args.named_methods,
        f"{next(iter(given), '')} goes with a method; name it, as in methods=[lm_infinite]",
    )
    # Bounds every number of a method, before the model is looked for.
    EvaluationConfig(**given)


def longest(args: LmEvalArguments, source: Source) -> int:
    """Return the most tokens of a prompt and its answer; `ConfigError` beyond those that the field was trained for."""
    t_max = architecture.t_max_of_field(args.path)
    reach = int((t_max or 1.0) * source.context_len)
    chosen = args.max_length or reach
    require(chosen >= 2, "max_length", chosen, "at least 2 tokens")
    require(
        t_max is None
        or chosen <= reach
        or not {Method.trained, Method.clex} & {*(args.named_methods or [Method.trained])},
        "max_length",
        chosen,
        f"beyond t_max * L = {t_max or 1:g} * {source.context_len}; leave the key out",
    )
    return chosen


def facts(args: LmEvalArguments, source: Source, tasks: harness.Tasks, dtype: torch.dtype, max_length: int) -> Origin:
    """Record weights, data and settings; data that tasks download are identified by the tasks' names only."""
    path, environment, data = Path(str(source.model.path)), origins.environment(dtype), {}
    if args.include:
        data = {"path": args.include, "fingerprint": origins.files_hash(Path(args.include), TASK_FILES)}
    shaping = {key: getattr(args, key) for key in ("lengths", "batch_size", "num_fewshot", "limit")}
    shaping |= {} if args.bos is Bos.auto else {"bos": args.bos.value}
    shaping |= {"chat_template": True} if args.chat_template else {}
    shaping |= json.loads(json.dumps(args.given(METHOD_KEYS), default=lambda choice: choice.value))
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
    """Write the metrics by key, and the harness's own record of tasks, versions and examples, as JSON.

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
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments_of.usage(__doc__, LmEvalConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="finished parts are kept, the same command resumes"))
