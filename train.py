"""Train or fine-tune a model: `deepspeed train.py +experiment=tiny_clex`, or with torchrun, or plain `python train.py`.

`--help` lists every field; `dry_run=true` prints sizes, memory and tokens without weights, data or a GPU.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Before the imports that take seconds, so that Ctrl-C has its one line from the first moment.
    from clex_train.resilience import stop_requests

    stop_requests.listen()

import hydra
from omegaconf import DictConfig

from clex_train.cli import console
from clex_train.cli.help import help_text
from clex_train.config import duration
from clex_train.config import root as configuration
from clex_train.models import architecture
from clex_train.resilience import stop_requests
from clex_train.utils import log, terminal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from clex_train.checkpoint.store import Checkpoints

STOP_FILE = "stop"
"""In the run folder: while it is there, the run is asked to stop; the next launch removes it."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
@console.task
def main(composed: DictConfig) -> None:
    """Turn what Hydra composed into a checked configuration and run it, or only print its plan."""
    config = configuration.to_config(composed)
    config.output_dir = console.sweep_folder(config.output_dir)
    if config.dry_run:
        from clex_train.preflight.dry_run import print_plan

        print_plan(config)
    else:
        run(config)


def run(config: configuration.Config) -> int:
    """Check every input, build the parts, train, write `final/`; returns the number of optimizer steps taken.

    Raises `ValueError` with the key and the remedy for what the user can mend, before the model is loaded;
    `StopRequested` when the run was asked to stop and has saved; `RunStopped` when it cannot go on.
    """
    from clex_train.preflight import out_of_memory
    from clex_train.tracking import run_folder
    from clex_train.utils import distributed
    from clex_train.utils.errors import RunStopped, is_out_of_memory

    run_dir = Path(config.output_dir)
    with run_folder.left_as_found(run_dir):
        run_folder.require_writable(run_dir)
        with run_folder.held(run_dir, distributed.rank(), patience=60 * config.engine.timeout):
            if distributed.is_main():
                run_folder.tidy(run_dir)
            try:
                return _run(config, run_dir)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise RunStopped(out_of_memory.explain(config, error)) from error


@log.after_opening()
def _run(config: configuration.Config, run_dir: Path) -> int:
    from clex_train.checkpoint.manifest import Manifest
    from clex_train.checkpoint.store import Checkpoints
    from clex_train.data import build as data
    from clex_train.data.overlap import require_disjoint
    from clex_train.data.vocabulary import check_embedding, check_tokenizer
    from clex_train.engine import deepspeed as engines
    from clex_train.engine import liger, sequence_parallel
    from clex_train.evaluation.during_training import TrainingEvaluation, warn_of_later
    from clex_train.models import kernels, load, memory_options, weights
    from clex_train.models.save import write_final
    from clex_train.preflight import document_mask
    from clex_train.preflight import sequence_parallel as splitting
    from clex_train.resilience.loss_spikes import SpikeWatch
    from clex_train.resilience.watchdog import watching
    from clex_train.tracking import metrics, run_folder, tracker
    from clex_train.training import loop
    from clex_train.training.ode_optimizer import OdeOptimizer
    from clex_train.utils import distributed

    stop = stop_requests.StopRequests(
        stop_requests.signals(),
        run_dir / STOP_FILE if distributed.is_main() else None,
        stop_requests.Deadline(duration.seconds("max_runtime", config.max_runtime)) if config.max_runtime else None,
    )
    load.check_attention(config.attention.implementation)
    liger.check(config.engine.liger)
    tracker.require_login(config.tracking)
    arch = architecture.to_train(config.model)
    architecture.warn_of_unused_config(config.model)
    weights.check(config.model, arch)
    context = architecture.context_source(config.model, arch)
    context_len = context.length
    stores = data.open_stores(config.data)
    held_out = data.held_out(config.data, config.evaluation.path)
    config = configuration.with_lengths(config, context_len, data.longest_document(held_out))
    asked, config = config, kernels.chosen(config, arch)
    store, fingerprint = next(iter(stores.values())), data.fingerprint(stores)
    tokenizer = load.training_tokenizer(config.model, arch, store.tokenizer_path)
    check_tokenizer(store, tokenizer)
    for each in stores.values():
        check_embedding(each, architecture.embedding_rows(arch), architecture.name(config.model))
    packed = data.pack(stores, config.data)
    rows = data.build_rows(packed, config.data, config.seed, config.optim.batch_rows)
    document_mask.check_document_mask(config, arch, context_len)
    memory_options.check(config.engine, arch, config.model.trust_remote_code)
    splitting.check_sequence_parallel(config, arch)
    interrupted = lambda: stop.reason() is not None  # noqa: E731
    configuration.check_protocols(config)
    evaluated = config.evaluation.every >= 0
    evaluation = TrainingEvaluation(config, store, context_len, tokenizer, interrupted) if evaluated else None
    if evaluation:
        require_disjoint(stores.values(), evaluation.store, config.evaluation.allow_overlap)
    elif distributed.is_main():
        warn_of_later(config, store)
    configuration.check_lambda_mask(config)
    configuration.check_reach(config, context_len)
    configuration.check_scaling(config, architecture.has_field(str(config.model.path)))
    configuration.check_positions(config, context_len)
    settings = engines.deepspeed_dict(config, distributed.world_size())
    trained = load.trained_architecture(config, arch)
    identity = Manifest.of_run(asked, architecture.digest(trained), fingerprint)
    is_strict = config.resume is configuration.Resume.strict
    checkpoints = Checkpoints(run_dir, config.checkpoint, identity, is_strict, run_folder.as_yaml(asked))
    newest = checkpoints.newest()
    other_ranks = newest is not None and newest.manifest.world_size != distributed.world_size()
    kept = newest.config() if newest else None
    run_folder.check_config(asked, newest is not None, other_ranks, architecture.own_context(asked.model, arch), kept)
    first_step = newest.manifest.step if newest else 0
    if first_step == config.optim.steps and _is_finished(asked, checkpoints, kept):
        return first_step
    lines = list(data.describe(stores, packed, config.data, config.optim, held_out if evaluated else None))
    if distributed.is_main():
        # Before the block invites to make it.
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    say_what_is_ahead(config, trained, context, settings, lines, first_step)
    data.warn_about_repetition(packed, config.data, config.optim)
    engines.open_process_group(config.engine)
    distributed.write_on_main(partial(_write_records, asked, kept, first_step, fingerprint))
    with watching(60 * config.engine.timeout):
        checkpoints.choose()
        loaded = load.load_for_training(config, arch, engines.precision(config.engine), settings)
        kernels.announce(config, arch, kernels.install(loaded.model, config))
        memory_options.install(loaded.model, config.engine)
        memory_options.announce(loaded.model, config.engine, distributed.device())
        ode = OdeOptimizer(loaded.clex, config.scaling, config.seed) if loaded.clex else None
        engine = engines.build(loaded.model, config)
        sequence = sequence_parallel.of_run(loaded.model, config, engine.train_micro_batch_size_per_gpu())
        if stop.deadline:
            stop.deadline.assume("save", metrics.assumed_save_seconds(load.num_parameters(loaded.model)))
        optim = config.optim
        spikes = SpikeWatch(optim.spike_factor, optim.spike_window) if optim.spike_factor else None
        flops = metrics.flops_per_token(*load.matmul_shape(loaded.model), config.data.seq_len)
        try:
            parts = loop.Parts(
                config, engine, loaded, rows, ode, checkpoints, evaluation, flops, stop, spikes, sequence
            )
            steps = loop.train(parts, partial(tracker.Tracker, config, run_dir))
            load.solve_table(loaded)
            write_final(run_dir / run_folder.FINAL, loaded, engines.consolidated_state_dict(engine), tokenizer)
        finally:
            engine.destroy()
    return steps


def _is_finished(config: configuration.Config, checkpoints: "Checkpoints", kept: Path | None) -> bool:
    """Tell whether the run's final model is whole, and tidy the folder if so; `kept` as in `_write_records`."""
    from clex_train.engine import deepspeed as engines
    from clex_train.models.save import is_finished
    from clex_train.tracking import run_folder
    from clex_train.utils import distributed

    final = Path(config.output_dir) / run_folder.FINAL
    engines.open_process_group(config.engine)
    if not is_finished(final):
        return False
    log.get("clex_train").info("%s is finished: its final model is in %s", config.output_dir, final)

    def tidy() -> None:
        checkpoints.tidy()
        checkpoints.retire(config.optim.steps)
        run_folder.restore_config(config, kept)

    distributed.write_on_main(tidy)
    return True


def _write_records(config: configuration.Config, kept: Path | None, first_step: int, fingerprint: str) -> None:
    """Write what says how the run was launched; `kept` is the newest checkpoint's copy of the configuration."""
    from clex_train.tracking import run_folder, tracker

    run_dir = Path(config.output_dir)
    if first_step:
        run_folder.restore_config(config, kept)
    run_folder.write_config(config)
    tracker.write_environment(run_dir, first_step, fingerprint)


def say_what_is_ahead(
    config: configuration.Config,
    arch: "PretrainedConfig",
    context: architecture.ContextLength,
    settings: dict[str, Any],
    data: list[tuple[str, str]],
    first_step: int,
) -> None:
    """Print what is about to be trained, before anything that costs; `settings` are DeepSpeed's."""
    from clex_train.engine import deepspeed as engines
    from clex_train.models import load
    from clex_train.tracking import summary
    from clex_train.utils import distributed

    subject = summary.Subject(
        weights=summary.weights_of(config.model),
        model_type=arch.model_type,
        num_parameters=load.count_parameters(arch, config.model.trust_remote_code),
        dtype=engines.precision(config.engine),
        context_len=context.length,
        context_source=context.source,
    )
    batch = summary.Batch(
        distributed.world_size(),
        settings["train_micro_batch_size_per_gpu"],
        settings["gradient_accumulation_steps"],
    )
    state = f"goes on from step {first_step:,}" if first_step else "a new run"
    title = f"train {config.name}, {state}, on {summary.device()} ({summary.versions()})"
    lines = summary.training(config, subject, batch, [summary.labelled(label, text) for label, text in data])
    summary.say(title, (*lines, *summary.output(config)))


if __name__ == "__main__":
    terminal.outlive("stdout", "stderr")
    log.setup()
    configuration.register()
    sys.exit(console.run(main, help_text, configuration.Config, kept="training had not begun"))
