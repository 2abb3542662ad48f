"""The summary that a program prints first: the task, the model, the data and the output.

Every line is `  label       text`. The summary is printed before weights are read or a GPU is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import torch

from clex_train.config.engine import Offload
from clex_train.config.method import FORMULAS, Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import Drift, FieldKind, ScalingConfig
from clex_train.utils import distributed, log

LABEL = 12
"""Width of the labels in characters."""
PACKAGES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Subject:
    """The model that a program is about to run, as described by its config."""

    weights: str
    """Their source in words: a directory, a hub name, or an architecture with random weights."""
    model_type: str
    num_parameters: int
    dtype: torch.dtype
    context_len: int
    """L in tokens."""
    context_source: str
    """The file or key that L was read from."""


@dataclass(frozen=True)
class Batch:
    """Split of the global batch of an optimizer step."""

    world_size: int
    """Ranks."""
    micro_batch: int
    """Sequences per rank in a forward pass."""
    accumulation: int
    """Micro batches per optimizer step."""


def print_summary(title: str, lines: Iterable[str]) -> None:
    """Print a summary on rank 0, then the log lines that were withheld until now."""
    if distributed.is_main():
        # Standard error: standard output has results only, so that it can be piped.
        print(log.printable("\n".join((title, *lines))), file=sys.stderr, flush=True)
    # Warnings of libraries during preflight would otherwise come before the summary.
    log.flush()


def versions() -> str:
    """Return the versions of the libraries that affect the numbers."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def labelled(label: str, text: str) -> str:
    """Format one line of the summary; an empty label continues the line above."""
    return f"  {label:<{LABEL}}{text}"


def weights_of(named: ModelConfig, is_there: bool = True) -> str:
    """Describe the source of a run's weights; with `is_there` false, the architecture that a plan uses instead."""
    if not named.is_pretrained:
        return f"random weights for the architecture of {named.config or named.path}"
    # A dry run may plan with the architecture of a preset alone.
    planned_by = "" if is_there else f" (not on this machine; planned by the architecture of {named.config})"
    return f"pretrained weights of {named.path or named.config}{planned_by}"


def model(subject: Subject) -> Iterator[str]:
    """Yield the lines about the model: weights and context length."""
    dtype = str(subject.dtype).removeprefix("torch.")
    yield labelled("model", f"{subject.weights}: {subject.model_type}, {subject.num_parameters:,} parameters, {dtype}")
    yield labelled("context", f"L = {subject.context_len:,} tokens ({subject.context_source})")


def training(config: Config, subject: Subject, batch: Batch, data: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a training run or its plan; `data` are the lines about the data."""
    yield from model(subject)
    yield labelled("scaling", _scaling(config, subject.context_len))
    yield from data
    yield from _steps(config, batch, subject.context_len)
    yield labelled("engine", _engine(config, batch))
    yield labelled("evaluation", _evaluation(config, subject.context_len))


def output(config: Config) -> Iterator[str]:
    """Yield the lines about the output folder, and about stopping and resuming."""
    every = config.checkpoint.every
    kept = f"a checkpoint every {every:,} steps and at the end" if every else "a checkpoint at the end only"
    yield labelled("output", f"{config.output_dir}: {kept}, then the model in final/")
    yield labelled(
        "to stop",
        "Ctrl-C saves and stops, as do SIGTERM and a file named stop in that folder; the same command resumes it",
    )


def device() -> str:
    """Name the device of this rank."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _steps(config: Config, batch: Batch, context_len: int) -> Iterator[str]:
    rows, seq_len, optim = config.optim.batch_rows, config.data.seq_len, config.optim
    # "(1 L)" would only add noise to the usual case.
    in_contexts = "" if seq_len == context_len else f" ({seq_len / context_len:g} L)"
    sequences = f"{_counted(rows, 'sequence')} * {seq_len:,} tokens{in_contexts}"
    each = f"{_counted(batch.micro_batch, 'sequence')} * {_counted(batch.accumulation, 'micro-batch', 'micro-batches')}"
    tokens = f"{rows * seq_len:,} tokens a step"
    yield labelled("batch", f"{sequences} = {tokens}: {_readers(config, batch)} * {each}")
    yield labelled("steps", f"{optim.steps:,}, in all {rows * seq_len * optim.steps:,} tokens")
    warmup = _counted(round(optim.warmup * optim.steps), "warm-up step")
    yield labelled("optimizer", f"AdamW, lr {optim.lr:g}, {optim.schedule.value} after {warmup}")


def _readers(config: Config, batch: Batch) -> str:
    """Name the readers of the batch: ranks, or sequence-parallel groups of ranks."""
    size = config.engine.sequence_parallel
    if size == 1:
        return _counted(batch.world_size, "rank")
    return f"{_counted(batch.world_size // size, 'group')} of {size} ranks"


def _engine(config: Config, batch: Batch) -> str:
    offload = "" if config.engine.offload is Offload.none else f", offload {config.engine.offload.name}"
    return f"DeepSpeed ZeRO-{config.engine.zero_stage}{offload}, {_counted(batch.world_size, 'rank')}"


def _scaling(config: Config, context_len: int) -> str:
    scaling = config.scaling
    if scaling.name is Method.none:
        return f"none: plain RoPE, contexts up to L = {context_len:,} tokens"
    if scaling.name in FORMULAS:
        return _formula(config, context_len)
    # Rounded down: the table ends at t_max.
    reach = int(scaling.t_max * context_len)
    # Only what differs from the paper's is worth a word.
    field = "" if scaling.field is FieldKind.paper else f", field {scaling.field.name}"
    drift = "" if scaling.drift is Drift.ntk else f", drift {scaling.drift.name}"
    return (
        f"clex: t from 1 to {scaling.t_max:g}{field}{drift}, L = {context_len:,}: contexts up to {reach:,} tokens; "
        f"{_positions(scaling)}"
    )


def _positions(scaling: ScalingConfig) -> str:
    used = f", {100 * scaling.as_used:g} % of the steps as used" if scaling.as_used else ""
    return f"positions {scaling.positions.name}{used}"


def _formula(config: Config, context_len: int) -> str:
    scaling = config.scaling
    factor = scaling.factor_for(config.data.seq_len, context_len)
    base = f", rope_theta {scaling.rope_theta:g}" if scaling.name is Method.theta else ""
    options = "".join(f", {name} {value}" for name, value in scaling.options.items())
    return (
        f"{scaling.name.name}: factor {factor:g}{base}{options}, L = {context_len:,}: contexts up to "
        f"{round(factor * context_len):,} tokens; {_positions(scaling)}"
    )


def _evaluation(config: Config, context_len: int) -> str:
    if config.evaluation.every < 0:
        return "never"
    # 0 is "at the end only", not "never".
    lengths = ", ".join(f"{n:,} ({n / context_len:g} L)" for n in config.evaluation.lengths)
    when = f"every {config.evaluation.every} steps and at the end" if config.evaluation.every else "at the end"
    methods = ", ".join(method.value for method in config.evaluation.methods)
    protocols = ", ".join(protocol.name for protocol in config.evaluation.protocols)
    return f"{lengths} tokens; {methods}; {protocols}; {when}"
