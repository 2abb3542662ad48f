"""Config group `optim`: optimizer, learning rate schedule, batch size and length of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS
from clex_train.utils.errors import require, require_at_most


class Schedule(Enum):
    """Learning-rate schedules after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


MOST = {
    "lr": 10,
    "eps": 1,
    "weight_decay": 1e3,
    "clip": 1e12,
    "steps": MOST_STEPS,
    "batch_rows": 2**24,
    "max_bad_steps": MOST_STEPS,
    "spike_factor": 1e9,
    "spike_window": 10**6,
    "max_roll_backs": MOST_STEPS,
}
"""Upper bounds that catch typing errors."""


@dataclass
class OptimConfig:
    """The `optim` group: AdamW, schedule, global batch size, spikes."""

    lr: float = 2e-5
    """Peak learning rate of the model's AdamW, above 0."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's first and second moments, each in [0, 1)."""
    eps: float = 1e-8
    """AdamW's epsilon, above 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, 0 or more."""
    clip: float = 1.0
    """Maximum global gradient norm, above 0."""
    steps: int = 1000
    """Optimizer steps of the whole run, at least 1."""
    batch_rows: int = 512
    """Global batch size in rows; the result does not depend on the number of ranks that share them."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0, in [0, 1)."""
    schedule: Schedule = Schedule.cosine
    """Shape of the learning rate after the warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the run divided by the peak, in [0, 1]."""
    max_bad_steps: int = 3
    """Consecutive steps with a non-finite loss or gradient (skipped) before the run stops."""
    spike_factor: float | None = None
    """Roll back when a loss exceeds median + this * MAD of the last `spike_window`, and skip its rows; null: off."""
    spike_window: int = 100
    """Number of losses that a spike is compared with, at least 3."""
    max_roll_backs: int = 3
    """Roll-backs per run; one more spike stops the run."""

    def __post_init__(self) -> None:
        # Bounds only: whether batch_rows divides over the ranks is known once the launcher has started.
        require_at_most(self, "optim.", MOST)
        require(self.lr > 0, "optim.lr", self.lr, "greater than 0")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two of [0, 1)"
        )
        require(self.eps > 0, "optim.eps", self.eps, "greater than 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "optim.clip", self.clip, "greater than 0")
        require(self.steps >= 1, "optim.steps", self.steps, "at least 1 step")
        require(self.batch_rows >= 1, "optim.batch_rows", self.batch_rows, "at least 1 row")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "a share of the steps in [0, 1)")
        require(self.max_bad_steps >= 1, "optim.max_bad_steps", self.max_bad_steps, "at least 1 step")
        # A factor of 0 would call every loss above the median a spike.
        require(
            self.spike_factor is None or self.spike_factor > 0,
            "optim.spike_factor",
            self.spike_factor,
            "above 0, or null",
        )
        # The MAD of fewer than three losses is zero or meaningless.
        require(self.spike_window >= 3, "optim.spike_window", self.spike_window, "at least 3 losses")
        require(self.max_roll_backs >= 0, "optim.max_roll_backs", self.max_roll_backs, "0 or more")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "between 0 and 1")
