"""Recovery from a step that went wrong: skip its update, find the fault, roll back from a loss spike, or give up.

    not finite    ZeRO skips the update on all ranks; the faulty module is named; too many in a row stop the run
    loss spike    load the newest checkpoint and leave the rows of the step out from then on
    no next step  a damaged store or an unstable field ends the run, with what can be saved saved

Every rank has the same metrics and takes the same decision; all functions are collective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clex_train.data.sampler import original_index
from clex_train.engine.deepspeed import has_stepped
from clex_train.token_store.shard_files import DamagedStore
from clex_train.tracking.metrics import row_spans
from clex_train.training import non_finite, state
from clex_train.utils import distributed, log, seeding
from clex_train.utils.errors import RunStopped

if TYPE_CHECKING:
    from clex_train.data.batch import MicroBatch
    from clex_train.scaling.solver import UnstableField
    from clex_train.scaling.spectrum import Spectrum
    from clex_train.tracking.tracker import Tracker
    from clex_train.training.state import Parts, Progress

logger = log.get(__name__)


def is_updated(parts: Parts, metrics: dict[str, Any]) -> bool:
    """Return True if loss and gradient of the last step were finite, so that its update was applied."""
    return math.isfinite(metrics["loss"]) and has_stepped(parts.engine)


def seed_dropout(parts: Parts, step: int, micro_batch: int) -> None:
    """Seed dropout from the position of a forward pass, so that a second pass drops what the first did."""
    torch.manual_seed(seeding.torch_seed(parts.config.seed, "dropout", step, micro_batch, distributed.rank()))


def skip_step(parts: Parts, progress: Progress, metrics: dict[str, Any]) -> None:
    """Log a warning about a step whose update was skipped.

    Raises:
        RunStopped: after `optim.max_bad_steps` in a row, with a checkpoint of the step before them; without ZeRO;
            when no step of the run was taken, since its weights would be those that it began with.
    """
    optim, step, bad_steps = parts.config.optim, progress.step, progress.bad_steps
    what = f"step {step}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}"
    # Only ZeRO's optimizers check the gradient before they step: without them the weights are damaged already.
    if parts.config.engine.zero_stage == 0:
        parts.checkpoints.finish()
        raise RunStopped(f"{what}; {parts.checkpoints.describe_newest()}; lower optim.lr in another output_dir")
    what += f" ({metrics['fault']})"
    if bad_steps == step == optim.steps:
        remedy = non_finite.remedy(parts.loaded.model)
        parts.checkpoints.finish()
        raise RunStopped(f"{what}; none of the run's {step} steps was taken, so nothing was learned; {remedy}")
    if bad_steps < optim.max_bad_steps:
        logger.warning("%s: not finite, its update is skipped on all ranks", what)
        return
    # Skipped updates have left the weights of the last good step, which is what is saved under its number.
    if step - bad_steps > progress.saved:
        state.save(parts, step - bad_steps)
    parts.checkpoints.finish()
    raise RunStopped(
        f"{what}; {bad_steps} such steps in a row, optim.max_bad_steps={optim.max_bad_steps}; "
        f"{parts.checkpoints.describe_newest()}; {non_finite.remedy(parts.loaded.model)}"
    )


def roll_back(parts: Parts, progress: Progress, tracker: Tracker, metrics: dict[str, Any]) -> None:
    """Return to the newest checkpoint and skip the rows of the last step, whose loss is a spike.

    Raises:
        RunStopped: after `optim.max_roll_backs`, or without a checkpoint.
    """
    spikes, optim, step = parts.spikes, parts.config.optim, progress.step
    what = f"step {step}: loss {metrics['loss']:g} is a spike, above {spikes.limit():g}, in rows {metrics['rows']}"
    places = range((step - 1) * optim.batch_rows, step * optim.batch_rows)
    skipped = [original_index(spikes.skipped, place) for place in places]
    roll_backs, before = spikes.roll_backs, spikes.skipped
    parts.checkpoints.finish()
    if roll_backs >= optim.max_roll_backs:
        raise RunStopped(f"{what}; optim.max_roll_backs={roll_backs}; {parts.checkpoints.describe_newest()}")
    back = state.resume(parts)
    if back == 0:
        raise RunStopped(f"{what}, and there is no checkpoint to go back to; lower checkpoint.every")
    # The checkpoint may be from before an earlier roll-back to it, and would forget the rows skipped then.
    spikes.skipped, spikes.roll_backs = before, roll_backs
    spikes.skip(skipped)
    tracker.roll_back(back)
    logger.warning("%s: back to step %d, and these rows are skipped (roll-back %d)", what, back, spikes.roll_backs)
    progress.step = progress.saved = back


def find_fault(
    parts: Parts,
    step: int,
    micro_batches: Sequence[MicroBatch],
    weights: Sequence[float],
    losses: Sequence[Tensor],
    spectrum: Spectrum | None,
) -> str:
    """Name rank, rows and module in which a loss or a gradient of the step stopped being finite.

    Micro-batches are run once more, with the weights that the skipped update left unchanged: the first of each rank
    whose loss is bad, or one after the other until a gradient is.
    """
    bad = _bad_losses_of_group(parts, losses)
    chosen = (bad or [0])[:1] if distributed.any_rank(bool(bad)) else range(len(losses))
    for index in chosen:
        batch = micro_batches[index]
        seed_dropout(parts, step, index)
        with parts.forward_pass.conditions(batch, spectrum):
            # The module without its engine: DeepSpeed's hooks would take the gradients for those of a step.
            loss = partial(parts.forward_pass.loss, parts.loaded.model, batch, weights[index])
            found = non_finite.find(parts.loaded.model, loss)
        own = f"rank {distributed.rank()}, rows {row_spans(batch.row_indices)}: {found}"
        is_bad = not bool(losses[index].isfinite())
        faults = [text for text in distributed.gather_objects(own if is_bad or found else None) if text]
        if faults:
            return "; ".join(faults)
    return "not again in a second pass, or in the gradients of weights alone"


def _bad_losses_of_group(parts: Parts, losses: Sequence[Tensor]) -> list[int]:
    """List the micro-batches with a bad loss on any rank of this rank's sequence-parallel group, which run together."""
    own = [index for index, loss in enumerate(losses) if not bool(loss.isfinite())]
    if parts.ranks_per_row == 1:
        return own
    first = distributed.rank() // parts.ranks_per_row * parts.ranks_per_row
    found = distributed.gather_objects(own)[first : first + parts.ranks_per_row]
    return sorted(set().union(*found))


def explain_end(parts: Parts, progress: Progress, error: DamagedStore | UnstableField) -> Exception:
    """Finish the checkpoints of a run whose next step is impossible, and return the error for the user."""
    step = progress.step
    if isinstance(error, DamagedStore):
        # The weights are good, only the next rows are not.
        if step > progress.saved:
            state.save(parts, step)
        parts.checkpoints.finish()
        return DamagedStore(f"step {step + 1}: {error}; {parts.checkpoints.describe_newest()}")
    parts.checkpoints.finish()
    why = non_finite.why_unstable(parts.loaded.model, error, progress.losses, parts.config.optim.lr)
    return RunStopped(f"step {step}: {why}; {parts.checkpoints.describe_newest()}; start again in another output_dir")
