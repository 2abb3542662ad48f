"""Training loop over a DeepSpeed engine: `train`, and `train_step` for one optimizer step.

    while step < steps and no rank received a stop request:
        metrics = train_step(parts, step, micro-batches)
        log; skip or roll back a bad step; save when due; evaluate when due

The state is one integer, the number of optimizer steps taken. Rows, t, positions, learning rate and dropout seeds are
functions of it, so a resumed run reads and draws what the uninterrupted one would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clex_train.data.batch import MicroBatch, collate_documents, collate_rows
from clex_train.data.loader import batches
from clex_train.data.sampler import SkippedRows
from clex_train.data.shards import shard_collate
from clex_train.data.step_batches import loss_weights, read_step
from clex_train.engine.deepspeed import gradient_norm, learning_rate, set_learning_rate
from clex_train.scaling.solver import UnstableField
from clex_train.token_store.shard_files import DamagedStore
from clex_train.tracking.metrics import row_spans, speed
from clex_train.training import recovery, state
from clex_train.training.state import Parts, Progress
from clex_train.training.step_reduce import all_reduce_step
from clex_train.utils import distributed
from clex_train.utils.errors import RunStopped, StopRequested

if TYPE_CHECKING:
    from clex_train.scaling.spectrum import Spectrum
    from clex_train.tracking.tracker import Tracker


def train(parts: Parts, tracker_factory: Callable[[int], Tracker]) -> int:
    """Train until `optim.steps`, from the newest checkpoint if there is one; return the number of steps taken.

    Raises:
        StopRequested: the ranks agreed to stop before; a checkpoint of the last step is saved.
        RunStopped: the run cannot continue.
        DamagedStore: rows of the next step cannot be read; a checkpoint of the last step is saved.
    """
    # From here on a signal must not end the process: there is something to save.
    parts.stop.leave_marks()
    step = state.resume(parts)
    progress = Progress(step, saved=step)
    tracker = tracker_factory(step)
    finished = False
    try:
        run_steps(parts, progress, tracker)
        finished = True
    except (DamagedStore, UnstableField) as error:
        raise recovery.explain_end(parts, progress, error) from error
    except RunStopped:
        # A checkpoint that is being written is still worth having; the first error is the one to report.
        with suppress(RunStopped):
            parts.checkpoints.finish()
        raise
    finally:
        tracker.close(finished)
    return progress.step


def run_steps(parts: Parts, progress: Progress, tracker: Tracker) -> None:
    """Take the optimizer steps of a run: log, recover, save and evaluate after each."""
    steps = parts.config.optim.steps
    micro_batches = read_micro_batches(parts, progress.step)
    any_stop_requested(parts, "step")
    evaluate_if_due(parts, progress, tracker)
    while progress.step < steps and not parts.stop.agreed:
        with parts.stop.timed("step"):
            metrics = train_step(parts, progress.step, next(micro_batches))
        progress.step += 1
        progress.losses.append(metrics["loss"])
        tracker.step({"step": progress.step, **metrics})
        # A full disk under the log stops the run at the next step, on all ranks together.
        parts.stop.fault = tracker.fault
        if not recovery.is_updated(parts, metrics):
            progress.bad_steps += 1
            recovery.skip_step(parts, progress, metrics)
        else:
            progress.bad_steps = 0
            if parts.spikes.is_spike(metrics["loss"]):
                recovery.roll_back(parts, progress, tracker, metrics)
                # The prefetched rows belong to steps after the spike.
                micro_batches = read_micro_batches(parts, progress.step)
                continue
        save_if_due(parts, progress, tracker)
        evaluate_if_due(parts, progress, tracker)
    if parts.stop.agreed:
        stop_early(parts, progress)
    _record_save(parts, parts.checkpoints.finish())


def read_micro_batches(parts: Parts, step: int) -> Iterator[Iterator[MicroBatch]]:
    """Yield this rank's micro-batches of each step from `step` on, without the rows that were skipped for a spike."""
    config, size = parts.config, parts.ranks_per_row
    skipped = parts.spikes.skipped
    collate = collate_documents if config.data.document_mask else collate_rows
    group, index = divmod(distributed.rank(), size)
    return batches(
        SkippedRows(parts.rows, skipped) if skipped else parts.rows,
        first_row=step * config.optim.batch_rows,
        batch_rows=config.optim.batch_rows,
        rank=group,
        world_size=distributed.world_size() // size,
        micro_batch=parts.engine.train_micro_batch_size_per_gpu(),
        collate=shard_collate(collate, index, size),
    )


def train_step(parts: Parts, step: int, micro_batches: Iterator[MicroBatch]) -> dict[str, Any]:
    """Take optimizer step `step`, counted from 0; return its metrics. Collective.

    `grad_norm` may still be a tensor on the device; reading it synchronizes.
    """
    config, engine, start = parts.config, parts.engine, time.perf_counter()
    batches, damage = read_step(micro_batches)
    weights = loss_weights(batches, step, damage)
    lr = learning_rate(step, config.optim)
    set_learning_rate(engine, lr)
    spectrum = parts.ode.begin(step)
    losses = accumulate_gradients(parts, step, batches, weights, spectrum)
    rows = torch.cat([batch.row_indices for batch in batches])
    wait = all_reduce_step(losses, parts.stop.reason("step") is not None, rows, parts.ode.gradient())
    engine.step()
    # The device is busy with the update from here on; the sums left it before, so waiting for them does not stall it.
    reduced = wait()
    parts.stop.agreed |= reduced.stop_requested
    metrics: dict[str, Any] = {"loss": reduced.loss, "lr": lr, "grad_norm": gradient_norm(engine)}
    is_updated = recovery.is_updated(parts, metrics)
    metrics |= parts.ode.update(step, lr, reduced.gradient, is_updated)
    # The ranks of a sequence-parallel group report the same rows: count the first of each group.
    metrics["rows"] = row_spans(reduced.rows.view(distributed.world_size(), -1)[:: parts.ranks_per_row])
    if not is_updated and config.engine.zero_stage > 0:
        metrics["fault"] = recovery.find_fault(parts, step, batches, weights, losses, spectrum)
    tokens = config.optim.batch_rows * config.data.seq_len
    seconds, peak = time.perf_counter() - start, config.tracking.peak_tflops
    return metrics | speed(step, tokens, seconds, parts.flops_per_token, peak)


def accumulate_gradients(
    parts: Parts, step: int, batches: Sequence[MicroBatch], weights: Sequence[float], spectrum: Spectrum | None
) -> list[Tensor]:
    """Run all micro-batches of a step forward and backward; return their weighted losses, on the device."""
    losses = []
    parts.engine.train()
    for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        if index > 0:
            # DeepSpeed counts micro-batches by calls of `step`; only the one after the last updates the weights.
            parts.engine.step()
        recovery.seed_dropout(parts, step, index)
        losses.append(forward_backward(parts, batch, spectrum, weight))
    return losses


def forward_backward(parts: Parts, batch: MicroBatch, spectrum: Spectrum | None, weight: float = 1.0) -> Tensor:
    """Return the weighted loss of a micro-batch, after adding its gradients to those of engine and spectrum."""
    with parts.forward_pass.conditions(batch, spectrum):
        # Only the loss is kept: a reference to the logits would hold them through the whole backward pass.
        loss = parts.forward_pass.loss(parts.engine, batch, weight)
        parts.engine.backward(loss)
    return loss.detach()


def save_if_due(parts: Parts, progress: Progress, tracker: Tracker) -> None:
    """Begin a checkpoint after `checkpoint.every` steps and after the last one; publish one that is written."""
    step = progress.step
    if _is_due(step, parts.config.checkpoint.every) or step == parts.config.optim.steps:
        tracker.saved(step, state.save(parts, step))
        progress.saved = step
    _record_save(parts, parts.checkpoints.poll())


def evaluate_if_due(parts: Parts, progress: Progress, tracker: Tracker) -> None:
    """Evaluate once after `evaluation.every` steps and after the last one.

    A resumed run evaluates the step it begins with if it was killed between saving and evaluating.
    """
    config, step = parts.config, progress.step
    due = step > 0 and (_is_due(step, config.evaluation.every) or step == config.optim.steps)
    if parts.evaluate is None or not due or not tracker.lacks_evaluation(step):
        return
    if any_stop_requested(parts, "evaluation"):
        return
    parts.ode.sync_from_rank0()
    try:
        with parts.stop.timed("evaluation"):
            results = parts.evaluate(parts.loaded, step)
    except StopRequested:
        parts.stop.agreed = True
    else:
        tracker.evaluation(step, results)


def any_stop_requested(parts: Parts, *ahead: str) -> bool:
    """Return True if any rank has a request to stop before the work `ahead`; the same on every rank. Collective."""
    parts.stop.agreed |= distributed.any_rank(parts.stop.reason(*ahead) is not None)
    return parts.stop.agreed


def stop_early(parts: Parts, progress: Progress) -> None:
    """Save the last step if that was not done and end the run. Collective.

    Raises:
        StopRequested: always, unless the same command would not get further.
        RunStopped: `max_runtime` is too short for a step, or a disk is full.
    """
    answers = distributed.gather_objects((parts.stop.reason(), parts.stop.is_too_short, parts.stop.fault))
    reason = next(f"{reason} (rank {rank})" for rank, (reason, *_) in enumerate(answers) if reason)
    if any(is_too_short for _, is_too_short, _ in answers):
        raise RunStopped(f"{reason}: too short for one step, or one evaluation, and its checkpoint; raise max_runtime")
    if progress.step > progress.saved:
        state.save(parts, progress.step)
    parts.checkpoints.finish()
    where = parts.checkpoints.describe_newest()
    if fault := next((fault for *_, fault in answers if fault), None):
        raise RunStopped(f"{fault}; {where}: make room and run the same command again")
    raise StopRequested(f"stopped after step {progress.step}: {reason}; {where}; the same command resumes it")


def _record_save(parts: Parts, seconds: float | None) -> None:
    """Let the deadline know how long a checkpoint took, if one was just completed."""
    if seconds is not None:
        parts.stop.deadline.took("save", seconds)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
