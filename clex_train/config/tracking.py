"""What is logged, and where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS, require, require_at_most


class Wandb(Enum):
    online = "online"
    offline = "offline"
    off = "off"


MOST = {
    "log_every": MOST_STEPS,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class TrackingConfig:
    wandb: Wandb = Wandb.offline
    """`online` needs a login, `offline` writes files to sync later, `off` leaves wandb alone."""
    project: str = "clex-train"
    """Name of the wandb project."""
    log_every: int = 1
    """Optimizer steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        require_at_most(self, "tracking.", MOST)
        require(self.log_every >= 1, "tracking.log_every", self.log_every, "at least 1 step")
