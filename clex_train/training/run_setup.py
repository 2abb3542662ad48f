"""Open a run that passed the checks: print its plan, join the process group, write the launch's records."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clex_train.data import build as data
from clex_train.engine import deepspeed as engines
from clex_train.model_config import size
from clex_train.tracking import environment, run_folder, summary
from clex_train.utils import distributed

if TYPE_CHECKING:
    from clex_train.preflight.run_checks import Preflight

STOP_FILE = "stop"
"""File in the run folder that requests a stop; the next launch removes it."""


def open_run(ready: Preflight) -> None:
    """Print the opening block, join the process group and write the run's records. Collective."""
    run_dir, config = Path(ready.config.output_dir), ready.config
    if distributed.is_main():
        # Remove it before the block tells the user to create it.
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    print_opening(ready)
    data.warn_about_repetition(ready.inputs.packed, config.data, config.optim)
    engines.open_process_group(config.engine)
    distributed.write_on_main(partial(_write_records, ready))


def print_opening(ready: Preflight) -> None:
    """Print the plan of the training run before anything expensive."""
    assert ready.history is not None
    config, settings, inputs, first_step = ready.config, ready.settings, ready.inputs, ready.history.first_step
    subject = summary.Subject(
        weights=summary.weights_of(config.model),
        model_type=ready.trained.model_type,
        num_parameters=size.num_parameters(ready.on_meta),
        dtype=engines.precision(config.engine),
        context_len=ready.context.length,
        context_source=ready.context.source,
    )
    micro_batch, accumulation = (
        settings[name] for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    batch = summary.Batch(ready.world_size, micro_batch, accumulation)
    documents = inputs.held_out if ready.evaluation else None
    described = data.describe(inputs.stores, inputs.packed, config.data, config.optim, documents)
    lines = [*summary.training(config, subject, batch, [summary.labelled(label, text) for label, text in described])]
    for index, line in enumerate(ready.adapters.describe() if ready.adapters else ()):
        lines.append(summary.labelled("" if index else "adapter", line))
    state = f"resumes from step {first_step:,}" if first_step else "a new run"
    title = f"train {config.name}, {state}, on {summary.device()} ({summary.versions()})"
    summary.print_summary(title, (*lines, *summary.output(config)))


def _write_records(ready: Preflight) -> None:
    """Write configuration and environment of the launch."""
    assert ready.history is not None
    run_dir, first_step = Path(ready.config.output_dir), ready.history.first_step
    if first_step:
        run_folder.restore_config(ready.requested, ready.history.recorded)
    run_folder.write_config(ready.requested)
    environment.write_environment(run_dir, first_step, data.fingerprint(ready.inputs.stores))
