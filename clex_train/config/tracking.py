"""Config group `tracking`: log interval, and the back end that shows the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS
from clex_train.utils.errors import require, require_at_most


class BackEnd(Enum):
    """Programs that show the metrics of a run."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"
    local = "local"


class Wandb(Enum):
    """Modes of wandb."""

    online = "online"
    offline = "offline"
    off = "off"


MOST = {
    "log_every": MOST_STEPS,
    "peak_tflops": 1e6,
}
"""Upper bounds that catch typing errors."""


@dataclass
class TrackingConfig:
    """The `tracking` group: back end, log interval, peak of the device."""

    name: BackEnd = BackEnd.wandb
    """Back end besides metrics.jsonl: `tensorboard` writes event files into the run folder, `trackio` a local database,
    `local` nothing. The first three log metrics, and each evaluation as a table and as curves over length."""
    wandb: Wandb | None = field(default=None, metadata={"choices": tuple(Wandb)})
    """Mode of wandb: `online` needs a login; `offline` (null) writes files to sync later; `off` is `tracking=local`."""
    project: str = "clex-train"
    """Name of the project in wandb and trackio."""
    space: str | None = None
    """Hugging Face Space (`owner/name`) that trackio sends to, after `hf auth login`; null keeps its database local."""
    log_every: int = 1
    """Optimizer steps between lines of metrics.jsonl, at least 1."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one device in TFLOP/s, for `mfu`; null takes it from a table of known GPUs."""

    def __post_init__(self) -> None:
        require_at_most(self, "tracking.", MOST)
        require(self.log_every >= 1, "tracking.log_every", self.log_every, "at least 1 step")
        positive = self.peak_tflops is None or self.peak_tflops > 0
        require(positive, "tracking.peak_tflops", self.peak_tflops, "more than 0 TFLOP/s")
        # Keys without an effect would let a user believe that the run is logged there.
        mode = self.wandb.value if self.wandb else None
        works = self.name is BackEnd.wandb or self.wandb in (None, Wandb.off)
        require(works, "tracking.wandb", mode, f"is a mode of tracking=wandb, but tracking.name={self.name.value}")
        works = self.name is BackEnd.trackio or self.space is None
        require(works, "tracking.space", self.space, f"needs tracking=trackio, but tracking.name={self.name.value}")

    @property
    def back_end(self) -> BackEnd:
        """The back end to log to; `tracking.wandb=off`, from before there were others, is `local`."""
        return BackEnd.local if self.name is BackEnd.wandb and self.wandb is Wandb.off else self.name
