"""Config group `tracking`: metrics and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS
from clex_train.utils.errors import require, require_at_most


class Wandb(Enum):
    """Modes of wandb."""

    online = "online"
    offline = "offline"
    off = "off"


MOST = {
    "log_every": MOST_STEPS,
}
"""Upper bounds that catch typing errors."""


@dataclass
class TrackingConfig:
    """The `tracking` group: log interval and wandb."""

    wandb: Wandb = Wandb.offline
    """`online` needs a login; `offline` writes files to sync later; `off` does not import wandb."""
    project: str = "clex-train"
    """Name of the wandb project."""
    log_every: int = 1
    """Optimizer steps between lines of metrics.jsonl, at least 1."""

    def __post_init__(self) -> None:
        require_at_most(self, "tracking.", MOST)
        require(self.log_every >= 1, "tracking.log_every", self.log_every, "at least 1 step")
