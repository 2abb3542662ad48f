"""The training loop over a DeepSpeed engine.

State is one integer, the number of optimizer steps taken: rows, t, positions, learning rate and dropout seeds are
functions of it, so a resumed run reads and draws what the uninterrupted one would have.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from clex_train.checkpoint.store import ODE, Checkpoints
from clex_train.config.root import Config
from clex_train.data.batch import joined, separated
from clex_train.data.loader import batches
from clex_train.data.order import SkippedRows, original_index
from clex_train.data.rows import Rows
from clex_train.data.shard_files import DamagedStore
from clex_train.data.shards import sharded
from clex_train.data.step_rows import loss_weights, read_step
from clex_train.engine import token_loss
from clex_train.engine.deepspeed import gradient_norm, has_stepped, learning_rate, set_learning_rate
from clex_train.engine.sequence_parallel import SequenceParallel
from clex_train.models.load import LoadedModel
from clex_train.resilience.loss_spikes import SpikeWatch
from clex_train.resilience.stop_requests import StopRequests
from clex_train.scaling.solver import UnstableField
from clex_train.scaling.spectrum import Spectrum
from clex_train.tracking import metrics
from clex_train.tracking.tracker import Tracker
from clex_train.training import non_finite
from clex_train.training import step as forward_pass
from clex_train.training.ode_optimizer import OdeOptimizer
from clex_train.training.step_reduce import exchange
from clex_train.utils import distributed, log, seeding
from clex_train.utils.errors import RunStopped, StopRequested, first_line

logger = log.get(__name__)

Batch = dict[str, torch.Tensor]
SPIKES = "spikes"
"""Key of the spike watch beside the ODE's state in a checkpoint."""


@dataclass
class Parts:
    """What a run is made of; `train.py` builds it."""

    config: Config
    engine: Any
    loaded: LoadedModel
    rows: Rows
    ode: OdeOptimizer | None
    checkpoints: Checkpoints
    evaluate: Callable[[LoadedModel, int], dict[str, float]] | None
    """Perplexities of the current weights at a step; collective. None: the run is not evaluated."""
    flops_per_token: float = 0.0
    """Of forward and backward, for the MFU on a GPU."""
    stop: StopRequests = field(default_factory=StopRequests)
    """What may ask the run to stop before its last step."""
    spikes: SpikeWatch | None = None
    """Decides which losses are spikes; None: none are."""
    sequence: SequenceParallel | None = None
    """Shares each row with other ranks; None: every rank reads rows of its own."""

    @property
    def row_ranks(self) -> int:
        """Ranks that read the same rows."""
        return self.sequence.size if self.sequence else 1


def train(parts: Parts, tracker_factory: Callable[[int], Tracker]) -> int:
    """Run until `optim.steps`, from the newest checkpoint if there is one; returns the number of steps taken.

    Raises `StopRequested` when the ranks agreed to stop before, with a checkpoint of the last step; `RunStopped` when
    the run cannot go on.
    """
    config = parts.config
    if parts.stop.signals:
        parts.stop.signals.leave_marks()
    step = saved = resume(parts)
    tracker = tracker_factory(step)
    stream = _stream(parts, step)
    losses: list[float] = []
    finished = False
    try:
        _agree(parts, "step")
        _evaluate_if_due(parts, tracker, step)
        bad_steps = 0
        while step < config.optim.steps and not parts.stop.agreed:
            with parts.stop.timed("step"):
                figures = train_step(parts, step, next(stream))
            step += 1
            losses.append(figures["loss"])
            tracker.step({"step": step, **figures})
            parts.stop.fault = tracker.fault
            bad_steps = 0 if _is_updated(parts, figures) else bad_steps + 1
            if bad_steps:
                _skip_or_stop(parts, step, figures, bad_steps, saved)
            elif parts.spikes and parts.spikes.is_spike(figures["loss"]):
                step = saved = _roll_back(parts, tracker, step, figures)
                stream = _stream(parts, step)
                continue
            if _due(step, config.checkpoint.every) or step == config.optim.steps:
                tracker.saved(step, save(parts, step))
                saved = step
            _settle(parts, parts.checkpoints.poll())
            _evaluate_if_due(parts, tracker, step)
        if parts.stop.agreed:
            _stop(parts, step, saved)
        _settle(parts, parts.checkpoints.finish())
        finished = True
    except (DamagedStore, UnstableField) as error:
        raise _why_ended(parts, error, step, saved, losses) from error
    except RunStopped:
        # A checkpoint that is being written is worth having all the more; the first error is the one to report.
        with suppress(RunStopped):
            parts.checkpoints.finish()
        raise
    finally:
        tracker.close(finished)
    return step


def _why_ended(
    parts: Parts, error: DamagedStore | UnstableField, step: int, saved: int, losses: list[float]
) -> Exception:
    """The error that the user sees of a run whose next step cannot be taken. Collective; the step before is saved."""
    if isinstance(error, DamagedStore):
        if step > saved:
            save(parts, step)
        parts.checkpoints.finish()
        return DamagedStore(f"step {step + 1}: {error}; {parts.checkpoints.describe_newest()}")
    parts.checkpoints.finish()
    why = non_finite.why_unstable(parts.loaded.model, error, losses, parts.config.optim.lr)
    return RunStopped(f"step {step}: {why}; {parts.checkpoints.describe_newest()}; start again in another output_dir")


def _stream(parts: Parts, step: int) -> Iterator[Iterator[Batch]]:
    """This rank's micro-batches of each step from `step` on, without the rows that were skipped for a spike."""
    config = parts.config
    skipped = parts.spikes.skipped if parts.spikes else []
    collate = separated if config.data.document_mask else joined
    group, index = divmod(distributed.rank(), parts.row_ranks)
    return batches(
        SkippedRows(parts.rows, skipped) if skipped else parts.rows,
        first_row=step * config.optim.batch_rows,
        batch_rows=config.optim.batch_rows,
        rank=group,
        world_size=distributed.world_size() // parts.row_ranks,
        micro_batch=parts.engine.train_micro_batch_size_per_gpu(),
        collate=sharded(collate, index, parts.row_ranks),
    )


def train_step(parts: Parts, step: int, micro_batches: Iterator[Batch]) -> dict[str, Any]:
    """One optimizer step: every micro-batch forward and backward, then the engine's update and the ODE's.

    `grad_norm` of the figures may be a tensor on the device, which only who looks at it has to wait for.
    """
    config, engine, start = parts.config, parts.engine, time.perf_counter()
    held, damage = read_step(micro_batches)
    weights, losses = loss_weights(held, step, damage), []
    lr = learning_rate(step, config.optim)
    set_learning_rate(engine, lr)
    spectrum = parts.ode.begin(step) if parts.ode else None
    engine.train()
    for index, (batch, weight) in enumerate(zip(held, weights, strict=True)):
        if index > 0:
            engine.step()
        _seed_dropout(parts, step, index)
        losses.append(forward_backward(parts, batch, spectrum, weight))
    rows = torch.cat([batch["row_index"] for batch in held])
    gradient = parts.ode.gradient() if parts.ode else None
    told = exchange(losses, parts.stop.reason("step") is not None, rows, gradient)
    engine.step()
    # From here on the device is busy with the weights; all that the host waits for has been on its way before.
    found = told()
    parts.stop.agreed |= found.asked_to_stop
    figures: dict[str, Any] = {"loss": found.loss, "lr": lr, "grad_norm": gradient_norm(engine)}
    is_updated = _is_updated(parts, figures)
    if parts.ode and spectrum:
        figures |= {"t": spectrum.t, "ode_grad_norm": parts.ode.finish(lr, found.gradient, apply=is_updated)}
        parts.ode.look_ahead(step + 1)
    figures["rows"] = metrics.row_spans(found.rows.view(distributed.world_size(), -1)[:: parts.row_ranks])
    if not is_updated and config.engine.zero_stage > 0:
        figures["fault"] = find_fault(parts, step, held, weights, losses, spectrum)
    tokens = config.optim.batch_rows * config.data.seq_len
    return figures | metrics.speed(step, tokens, time.perf_counter() - start, parts.flops_per_token)


def forward_backward(parts: Parts, batch: Batch, spectrum: Spectrum | None, weight: float = 1.0) -> torch.Tensor:
    """Weighted loss of one micro-batch (mean over its scored tokens), its gradients added up in engine and spectrum."""
    with _in_force(parts, batch, spectrum):
        # Only the loss is held: the logits would otherwise stay through the whole backward pass.
        loss = forward(parts.engine, parts, batch, weight)
        parts.engine.backward(loss)
    return loss.detach()


def forward(model: Any, parts: Parts, batch: Batch, weight: float) -> torch.Tensor:
    """Weighted loss of one micro-batch under `model`, the engine or what it wraps."""
    mean_nll = token_loss.choose_loss(parts.config.engine)
    targets = batch["shift_labels"] if parts.sequence else token_loss.shifted(batch["labels"])
    inputs = forward_pass.arguments(parts.config, batch, parts.sequence)
    return weight * mean_nll(model, distributed.to_device(targets), **inputs)


def _in_force(parts: Parts, batch: Batch, spectrum: Spectrum | None) -> AbstractContextManager[None]:
    return forward_pass.in_force(parts.config, parts.loaded, batch, spectrum, parts.sequence)


def find_fault(
    parts: Parts,
    step: int,
    micro_batches: Sequence[Batch],
    weights: Sequence[float],
    losses: Sequence[torch.Tensor],
    spectrum: Spectrum | None,
) -> str:
    """Rank, rows and module in which a loss or a gradient of the step stopped being finite; collective.

    Micro-batches are run once more, with the weights that the skipped update left as they were: the first of each rank
    whose loss is bad, or one after the other until a gradient is.
    """
    model: Any = parts.loaded.model
    bad = _bad_in_group(parts, losses)
    chosen = (bad or [0])[:1] if distributed.any_rank(bool(bad)) else range(len(losses))
    for index in chosen:
        batch = micro_batches[index]
        _seed_dropout(parts, step, index)
        with _in_force(parts, batch, spectrum):
            found = non_finite.find(model, partial(forward, model, parts, batch, weights[index]))
        own = f"rank {distributed.rank()}, rows {metrics.row_spans(batch['row_index'])}: {found}"
        is_bad = not bool(losses[index].isfinite())
        told = [text for text in distributed.gather_objects(own if is_bad or found else None) if text]
        if told:
            return "; ".join(told)
    return "not again in a second pass, or in the gradients of weights alone"


def _bad_in_group(parts: Parts, losses: Sequence[torch.Tensor]) -> list[int]:
    """Micro-batches with a loss that is not finite on this rank or one that shares its rows: they run them together."""
    own = [index for index, loss in enumerate(losses) if not bool(loss.isfinite())]
    if parts.row_ranks == 1:
        return own
    first = distributed.rank() // parts.row_ranks * parts.row_ranks
    found = distributed.gather_objects(own)[first : first + parts.row_ranks]
    return sorted(set().union(*found))


def _seed_dropout(parts: Parts, step: int, micro_batch: int) -> None:
    torch.manual_seed(seeding.torch_seed(parts.config.seed, "dropout", step, micro_batch, distributed.rank()))


def resume(parts: Parts) -> int:
    """Load the newest complete checkpoint into engine, ODE and spike watch; 0 when there is none."""
    found = parts.checkpoints.load(parts.engine, lambda: parts.stop.reason() is not None)
    if found is None:
        return 0
    step, state = found
    try:
        if parts.ode:
            parts.ode.load_state_dict(state or {})
        if parts.spikes and state and SPIKES in state:
            parts.spikes.load_state_dict(state[SPIKES])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        folder = parts.checkpoints.folder
        raise ValueError(
            f"checkpoint {folder / f'step_{step}'}: {ODE} is not the state of this run's field ({first_line(error)}); "
            "remove the checkpoint to continue an older one, or choose another output_dir"
        ) from error
    return step


def save(parts: Parts, step: int) -> float:
    """Begin a checkpoint of the current state; collective. Returns the seconds that training waited for it.

    `UnstableField` if the field is not worth keeping.
    """
    if parts.ode:
        parts.ode.verify()
    state = parts.ode.state_dict() if parts.ode else {}
    if parts.spikes:
        state[SPIKES] = parts.spikes.state_dict()
    return parts.checkpoints.save(parts.engine, state or None, step, step * parts.config.optim.batch_rows)


def _settle(parts: Parts, seconds: float | None) -> None:
    """Let the deadline know how long a checkpoint took that has just been completed."""
    if seconds is not None and parts.stop.deadline:
        parts.stop.deadline.took("save", seconds)


def _evaluate_if_due(parts: Parts, tracker: Tracker, step: int) -> None:
    """Evaluate once at a step that asks for it: also on resume, if the run was killed between saving and evaluating."""
    config = parts.config
    due = step > 0 and (_due(step, config.evaluation.every) or step == config.optim.steps)
    if not parts.evaluate or not due or not tracker.lacks_evaluation(step) or _agree(parts, "evaluation"):
        return
    if parts.ode:
        parts.ode.agree()
    try:
        with parts.stop.timed("evaluation"):
            results = parts.evaluate(parts.loaded, step)
    except StopRequested:
        parts.stop.agreed = True
    else:
        tracker.evaluation(step, results)


def _agree(parts: Parts, *ahead: str) -> bool:
    """Whether a rank was asked to stop before doing what lies ahead; the same on every rank."""
    parts.stop.agreed |= distributed.any_rank(parts.stop.reason(*ahead) is not None)
    return parts.stop.agreed


def _stop(parts: Parts, step: int, saved: int) -> None:
    """Save the last step if that was not done and raise `StopRequested`; `RunStopped` if stopping leads nowhere."""
    answers = distributed.gather_objects((parts.stop.reason(), parts.stop.leads_nowhere, parts.stop.fault))
    reason = next(f"{reason} (rank {rank})" for rank, (reason, *_) in enumerate(answers) if reason)
    if any(leads_nowhere for _, leads_nowhere, _ in answers):
        raise RunStopped(f"{reason}: too short for one step, or one evaluation, and its checkpoint; raise max_runtime")
    if step > saved:
        save(parts, step)
    parts.checkpoints.finish()
    where = parts.checkpoints.describe_newest()
    if fault := next((fault for *_, fault in answers if fault), None):
        raise RunStopped(f"{fault}; {where}: make room and run the same command again")
    raise StopRequested(f"stopped after step {step}: {reason}; {where}; the same command goes on")


def _is_updated(parts: Parts, figures: dict[str, Any]) -> bool:
    """Whether loss and gradient of the step were finite, so that its update counts; the same on every rank."""
    return math.isfinite(figures["loss"]) and has_stepped(parts.engine)


def _skip_or_stop(parts: Parts, step: int, figures: dict[str, Any], bad_steps: int, saved: int) -> None:
    """Announce a step whose update was skipped; `RunStopped` after too many, with a checkpoint of what was before them.

    All steps of a run are too many too: its weights would be those that it began with. Every rank has the same figures.
    """
    optim = parts.config.optim
    what = f"step {step}: loss {figures['loss']:g}, gradient norm {figures['grad_norm']:g}"
    # Only ZeRO's optimizers look before they step: without them the weights are already spoilt.
    if parts.config.engine.zero_stage == 0:
        parts.checkpoints.finish()
        raise RunStopped(f"{what}; {parts.checkpoints.describe_newest()}; lower optim.lr in another output_dir")
    what += f" ({figures['fault']})"
    if bad_steps == step == optim.steps:
        remedy = non_finite.remedy(parts.loaded.model)
        parts.checkpoints.finish()
        raise RunStopped(f"{what}; none of the run's {step} steps was taken, so nothing was learned; {remedy}")
    if bad_steps < optim.max_bad_steps:
        logger.warning("%s: not finite, its update is skipped on all ranks", what)
        return
    if step - bad_steps > saved:
        save(parts, step - bad_steps)
    parts.checkpoints.finish()
    raise RunStopped(
        f"{what}; {bad_steps} such steps in a row, optim.max_bad_steps={optim.max_bad_steps}; "
        f"{parts.checkpoints.describe_newest()}; {non_finite.remedy(parts.loaded.model)}"
    )


def _roll_back(parts: Parts, tracker: Tracker, step: int, figures: dict[str, Any]) -> int:
    """Return to the newest checkpoint and skip the rows of the step whose loss is a spike; collective.

    `RunStopped` when that has been done `optim.max_roll_backs` times, or there is no checkpoint.
    """
    spikes, optim = parts.spikes, parts.config.optim
    assert spikes is not None
    what = f"step {step}: loss {figures['loss']:g} is a spike, above {spikes.limit():g}, in rows {figures['rows']}"
    places = range((step - 1) * optim.batch_rows, step * optim.batch_rows)
    skipped = [original_index(spikes.skipped, place) for place in places]
    roll_backs, before = spikes.roll_backs, spikes.skipped
    parts.checkpoints.finish()
    if roll_backs >= optim.max_roll_backs:
        raise RunStopped(f"{what}; optim.max_roll_backs={roll_backs}; {parts.checkpoints.describe_newest()}")
    back = resume(parts)
    if back == 0:
        raise RunStopped(f"{what}, and there is no checkpoint to go back to; lower checkpoint.every")
    # The checkpoint may be from before an earlier roll-back to it.
    spikes.skipped, spikes.roll_backs = before, roll_backs
    spikes.skip(skipped)
    tracker.roll_back(back)
    logger.warning("%s: back to step %d, and these rows are skipped (roll-back %d)", what, back, spikes.roll_backs)
    return back


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
