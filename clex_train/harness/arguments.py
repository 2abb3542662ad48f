"""Arguments of the program that runs tasks of lm-eval, and their checks before a model is looked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clex_train.config.bos import Bos
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.console.loading_keys import METHOD_KEYS, LoadingConfig, with_overrides
from clex_train.evaluation import methods
from clex_train.harness.truncation import Truncation
from clex_train.models import architecture
from clex_train.rope.native import native_handle_on_meta
from clex_train.utils import distributed
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most

MOST = {
    "lengths": MOST_TOKENS,
    "max_length": MOST_TOKENS,
    "max_prompt": MOST_TOKENS,
    "batch_size": 2**20,
    "num_fewshot": 10**4,
    "limit": 10**9,
}
"""Largest sensible values."""


@dataclass
class LmEvalArguments(LoadingConfig):
    """Arguments of the program that runs tasks of lm-eval, without those of scaling methods."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks, groups or tags, or patterns such as `longbench_*`; by default all tasks of `benchmark`."""
    benchmark: str | None = None
    """Folder that `python -m data_prep benchmark` wrote: its tasks alone, with averages."""
    include: str | None = None
    """Folder with task files (YAML) of your own."""
    lengths: list[int] | None = None
    """Lengths in tokens of tasks that are made at any length (RULER); by default the task's own."""
    max_length: int | None = None
    """Most tokens of prompt and answer; longer prompts are cut. By default t_max * L (L without CLEX)."""
    truncation: Truncation | None = None
    """Part that longer prompts lose: `left`, their beginning, as lm-eval does it, or `middle`, half from each end, as
    LongBench does it. By default `middle` with `benchmark`, else `left`."""
    max_prompt: int | None = None
    """Most tokens of a prompt before the chat template; longer ones lose their middle (`max_length` in LongBench's own
    code, 3500 there for a model of 4,096). By default what answer and template leave of `max_length`."""
    batch_size: int = 1
    """Prompts in a forward. They share one t, that of the longest; with 1 each has its own."""
    num_fewshot: int | None = None
    """Examples before each question; by default the task's own."""
    bos: Bos = Bos.auto
    """BOS at the beginning of prompts. `auto`: as the tokenizer does by default."""
    limit: int | None = None
    """Only the first documents of each task."""
    chat_template: bool = False
    """Prompts are turns in the chat template of the tokenizer, for instruct models. LongBench's few-shot and
    code tasks, in a `benchmark`, are read without, as in its own code."""

    @property
    def named_methods(self) -> list[Method] | None:
        """Methods to compare; None for the unchanged model."""
        return self.given(("methods",)).get("methods")

    @property
    def cutting(self) -> Truncation:
        """Part that longer prompts lose."""
        if self.truncation is not None:
            return self.truncation
        return Truncation.left if self.benchmark is None and self.max_prompt is None else Truncation.middle


LmEvalConfig = with_overrides(LmEvalArguments, EvaluationConfig, METHOD_KEYS)


def check(args: LmEvalArguments) -> None:
    """Raise `ConfigError` for keys that are missing, out of range or contradict each other."""
    require_at_most(args, "", MOST)
    require(all(n >= 2 for n in args.lengths or ()), "lengths", args.lengths, "lengths of at least 2 tokens")
    require(
        len(args.tasks) > 0 or args.benchmark is not None,
        "tasks",
        args.tasks,
        "one or more names, such as tasks=[longbench_qasper]",
    )
    _check_benchmark(args)
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


def _check_benchmark(args: LmEvalArguments) -> None:
    """Raise `ConfigError` for keys that contradict `benchmark`, and for contradicting keys of truncation."""
    alone = args.benchmark is None or (args.include is None and args.lengths is None)
    other = "include" if args.include is not None else "lengths"
    require(alone, other, getattr(args, other), "a benchmark has its own tasks and lengths; leave one of the keys out")
    require(
        args.max_prompt is None or args.max_prompt >= 2, "max_prompt", args.max_prompt, "at least 2 tokens, one an end"
    )
    is_middle = args.max_prompt is None or args.cutting is Truncation.middle
    require(is_middle, "max_prompt", args.max_prompt, "truncates in the middle; leave truncation=left out")


def longest(args: LmEvalArguments, context_len: int) -> int:
    """Return the most tokens of a prompt and its answer; `ConfigError` beyond those that the field was trained for."""
    t_max = architecture.t_max_of_field(args.path)
    reach = int((t_max or 1.0) * context_len)
    chosen = args.max_length or reach
    require(chosen >= 2, "max_length", chosen, "at least 2 tokens")
    require(
        t_max is None
        or chosen <= reach
        or not {Method.trained, Method.clex} & {*(args.named_methods or [Method.trained])},
        "max_length",
        chosen,
        f"beyond t_max * L = {t_max or 1:g} * {context_len}; leave the key out",
    )
    return chosen


def method_settings(args: LmEvalArguments, model: ModelConfig, context_len: int, max_length: int) -> EvaluationConfig:
    """Return the methods with their settings; `ConfigError` for one that does not fit the model."""
    spec = EvaluationConfig(**args.given(METHOD_KEYS), lengths=[max_length])
    arch = architecture.to_read(model)
    unloaded = native_handle_on_meta(arch, context_len, model.trust_remote_code)
    path = str(model.path)
    methods.check(spec, unloaded, architecture.has_field(path), architecture.grid_of_field(path))
    return spec
