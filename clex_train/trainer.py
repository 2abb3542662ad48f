"""The training loop over a DeepSpeed engine.

State is one integer, the number of optimizer steps taken: rows, t, positions, learning rate and dropout seeds are
functions of it, so a resumed run reads and draws what the uninterrupted one would have.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from clex_train import distributed, log, metrics, seeding
from clex_train.checkpoint import Checkpoints
from clex_train.config import Config
from clex_train.data.loader import batches
from clex_train.data.rows import Rows
from clex_train.engine.deepspeed import learning_rate, set_learning_rate
from clex_train.engine.ode_optimizer import OdeOptimizer
from clex_train.faults import RunStopped
from clex_train.modeling import LoadedModel
from clex_train.scaling.sampling import draw_batch
from clex_train.scaling.solver import UnstableField
from clex_train.scaling.spectrum import Spectrum
from clex_train.tracking import Tracker

logger = log.get(__name__)

Batch = dict[str, torch.Tensor]


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


def train(parts: Parts, tracker_factory: Callable[[int], Tracker]) -> int:
    """Run until `optim.steps`, from the newest checkpoint if there is one; returns the number of steps taken."""
    config = parts.config
    step = resume(parts)
    tracker = tracker_factory(step)
    stream = batches(
        parts.rows,
        first_row=step * config.optim.batch_rows,
        batch_rows=config.optim.batch_rows,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch=parts.engine.train_micro_batch_size_per_gpu(),
    )
    finished = False
    try:
        _evaluate_if_due(parts, tracker, step)
        bad_steps = 0
        while step < config.optim.steps:
            figures = train_step(parts, step, next(stream))
            step += 1
            tracker.step({"step": step, **figures})
            bad_steps = 0 if _is_finite(figures) else bad_steps + 1
            if bad_steps:
                _skip_or_stop(parts, step, figures, bad_steps)
            if _due(step, config.checkpoint.every) or step == config.optim.steps:
                save(parts, step)
            _evaluate_if_due(parts, tracker, step)
        finished = True
    except UnstableField as error:
        raise RunStopped(
            f"step {step}: {error}; {parts.checkpoints.describe_newest()}; start again in another output_dir"
        ) from error
    finally:
        tracker.close(finished)
    return step


def train_step(parts: Parts, step: int, micro_batches: Iterator[Batch]) -> dict[str, float]:
    """One optimizer step: every micro-batch forward and backward, then the engine's update and the ODE's."""
    config, engine, start = parts.config, parts.engine, time.perf_counter()
    lr = learning_rate(step, config.optim)
    set_learning_rate(engine, lr)
    spectrum = parts.ode.begin(step) if parts.ode else None
    loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=distributed.device()), 0
    engine.train()
    for index, batch in enumerate(micro_batches):
        torch.manual_seed(seeding.torch_seed(config.seed, "dropout", step, index, distributed.rank()))
        loss = forward_backward(parts, batch, spectrum)
        loss_sum += loss
        tokens += batch["input_ids"].numel()
        engine.step()
    loss_mean = float(distributed.all_reduce_mean(loss_sum / (index + 1)))
    figures = {"loss": loss_mean, "lr": lr, "grad_norm": float(engine.get_global_grad_norm() or 0.0)}
    if parts.ode and spectrum:
        figures |= {"t": spectrum.t, "ode_grad_norm": parts.ode.finish(lr, apply=_is_finite(figures))}
    return figures | _speed(parts, step, tokens * distributed.world_size(), time.perf_counter() - start)


def forward_backward(parts: Parts, batch: Batch, spectrum: Spectrum | None) -> torch.Tensor:
    """Loss of one micro-batch (mean over its tokens), with its gradients accumulated in the engine and the spectrum."""
    device = distributed.device()
    with _frequencies(parts, batch["row_index"], spectrum):
        # Only the loss is held: the logits would otherwise stay through the whole backward pass.
        loss = parts.engine(
            input_ids=batch["input_ids"].to(device), labels=batch["labels"].to(device), use_cache=False
        ).loss
        parts.engine.backward(loss)
    return loss.detach()


def resume(parts: Parts) -> int:
    """Load the newest complete checkpoint into the engine and the ODE; 0 when there is none."""
    found = parts.checkpoints.load(parts.engine)
    if found is None:
        return 0
    step, ode_state = found
    if parts.ode:
        assert ode_state is not None, "a checkpoint of a CLEX run has the ODE's state"
        parts.ode.load_state_dict(ode_state)
    return step


def save(parts: Parts, step: int) -> None:
    """Write a checkpoint of the current state; collective. `UnstableField` if the field is not worth keeping."""
    if parts.ode:
        parts.ode.verify()
    ode_state = parts.ode.state_dict() if parts.ode else None
    parts.checkpoints.save(parts.engine, ode_state, step, step * parts.config.optim.batch_rows)


def _frequencies(parts: Parts, row_index: torch.Tensor, spectrum: Spectrum | None) -> AbstractContextManager[None]:
    """The rotary module at the step's spectrum and the rows' own sampled positions; plain RoPE without a spectrum."""
    if spectrum is None:
        return nullcontext()
    config = parts.config
    positions = draw_batch(
        config.scaling.positions.value,
        row_index.tolist(),
        seq_len=config.data.seq_len,
        context_len=parts.loaded.context_len,
        t=spectrum.t,
        seed=config.seed,
        mix_random=config.scaling.mix_random,
        max_chunks=config.scaling.max_chunks,
    )
    return parts.loaded.handle.training(spectrum, positions)


def _evaluate_if_due(parts: Parts, tracker: Tracker, step: int) -> None:
    """Evaluate once at a step that asks for it: also on resume, if the run was killed between saving and evaluating."""
    config = parts.config
    due = step > 0 and (_due(step, config.evaluation.every) or step == config.optim.steps)
    if parts.evaluate and due and tracker.lacks_evaluation(step):
        tracker.evaluation(step, parts.evaluate(parts.loaded, step))


def _is_finite(figures: dict[str, float]) -> bool:
    return math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])


def _skip_or_stop(parts: Parts, step: int, figures: dict[str, float], bad_steps: int) -> None:
    """Announce a step whose update was skipped; `RunStopped` after too many. Every rank has the same figures."""
    what = f"step {step}: loss {figures['loss']:g}, gradient norm {figures['grad_norm']:g}"
    # Only ZeRO's optimizers look before they step: without them the weights are already spoilt.
    if bad_steps >= parts.config.optim.max_bad_steps or parts.config.engine.zero_stage == 0:
        raise RunStopped(f"{what}; {parts.checkpoints.describe_newest()}; lower optim.lr in another output_dir")
    logger.warning("%s: not finite, its update is skipped on all ranks", what)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _speed(parts: Parts, step: int, tokens: int, seconds: float) -> dict[str, float]:
    figures = {
        "tokens": (step + 1) * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "memory_gib": metrics.peak_memory_gib(),
    }
    mfu = metrics.model_flops_utilisation(tokens / seconds, parts.flops_per_token, distributed.world_size())
    return figures if mfu is None else figures | {"mfu": mfu}
