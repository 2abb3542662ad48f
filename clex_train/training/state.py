"""Parts of a run, its progress, and the state that a checkpoint stores in addition to the engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clex_train.resilience.loss_spikes import NoSpikeWatch, SpikeWatch
from clex_train.resilience.stop_requests import StopRequests
from clex_train.training.step import ForwardPass, build_forward_pass
from clex_train.utils.errors import ConfigError, first_line, require

if TYPE_CHECKING:
    from clex_train.adapters.trained_set import TrainedSet
    from clex_train.checkpoint.store import Checkpoints
    from clex_train.config.root import Config
    from clex_train.data.rows import Rows
    from clex_train.engine.sequence_parallel import SequenceParallel
    from clex_train.models.load import LoadedModel
    from clex_train.training.ode_optimizer import FixedFrequencies, OdeOptimizer
    from clex_train.utils.protocols import Engine

SPIKES, FROZEN = "spikes", "frozen"
"""Keys, among the ODE's state in a checkpoint: the spike watch's state, and the digest of frozen weights."""


@dataclass
class Parts:
    """Everything that the training loop uses; built once before it."""

    config: Config
    engine: Engine
    loaded: LoadedModel
    rows: Rows
    ode: OdeOptimizer | FixedFrequencies
    checkpoints: Checkpoints
    evaluate: Callable[[LoadedModel, int], dict[str, float]] | None
    """Computes perplexities of the current weights at a step; collective. None: the run is not evaluated."""
    flops_per_token: float = 0.0
    """FLOPs of forward and backward pass, for the MFU on a GPU."""
    stop: StopRequests = field(default_factory=StopRequests)
    """Collects requests to stop the run before its last step."""
    spikes: SpikeWatch | NoSpikeWatch = field(default_factory=NoSpikeWatch)
    """Decides which losses are spikes."""
    sequence: SequenceParallel | None = None
    """Sequence parallelism; None: every rank reads rows of its own."""
    trained: TrainedSet | None = None
    """Adapters; None: every weight is trained."""
    frozen: str = ""
    """Digest of the weights below the adapters, which checkpoints leave out; empty without adapters."""
    forward_pass: ForwardPass = field(init=False)

    def __post_init__(self) -> None:
        self.forward_pass = build_forward_pass(self.config, self.loaded, self.sequence)

    @property
    def ranks_per_row(self) -> int:
        """Number of ranks that read the same rows."""
        return self.forward_pass.layout.size


@dataclass
class Progress:
    """Position of a run; the same on every rank."""

    step: int
    """Optimizer steps taken."""
    saved: int
    """Step of the newest checkpoint, 0 without one."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step since the launch."""
    bad_steps: int = 0
    """Steps in a row whose update was skipped."""


def resume(parts: Parts) -> int:
    """Load the newest complete checkpoint into engine, ODE and spike watch; return its step, 0 without one.

    Raises:
        ConfigError: the checkpoint's state is not that of this run's field.
    """
    found = parts.checkpoints.load(parts.engine, lambda: parts.stop.reason() is not None)
    if found is None:
        return 0
    step, state = found[0], found[1] or {}
    require(
        state.get(FROZEN, "") == parts.frozen,
        "model.path",
        parts.config.model.path,
        f"its weights are not those below the adapters of {parts.checkpoints.folder / f'step_{step}'}, which holds the "
        "adapters alone; give the model that the run began with, in the same precision",
    )
    try:
        parts.ode.load_state_dict(state)
        if SPIKES in state:
            parts.spikes.load_state_dict(state[SPIKES])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        folder = parts.checkpoints.folder
        raise ConfigError(
            f"checkpoint {folder / f'step_{step}'}",
            None,
            f"{parts.checkpoints.ode_file} is not the state of this run's field ({first_line(error)}); "
            "remove the checkpoint to continue an older one, or choose another output_dir",
        ) from error
    return step


def save(parts: Parts, step: int) -> float:
    """Begin a checkpoint of the current state; collective. Returns the seconds that training waited for it.

    Raises:
        UnstableField: the field is not worth keeping.
    """
    parts.ode.verify()
    state = parts.ode.state_dict()
    if spikes := parts.spikes.state_dict():
        state[SPIKES] = spikes
    if parts.frozen:
        state[FROZEN] = parts.frozen
    return parts.checkpoints.save(parts.engine, state or None, step, step * parts.config.optim.batch_rows)
