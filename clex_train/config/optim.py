"""The optimizer, its schedule and the length of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS, require, require_at_most


class Schedule(Enum):
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
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class OptimConfig:
    lr: float = 2e-5
    """Peak learning rate of the model's AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global gradient norm."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_rows: int = 512
    """Rows per optimizer step over all ranks; the run is the same however many ranks share them."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Schedule = Schedule.cosine
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the run as a multiple of the peak."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops."""
    spike_factor: float | None = None
    """A loss above median + this * MAD of the last `spike_window`: back to the last checkpoint, without its rows."""
    spike_window: int = 100
    """Losses that a spike is measured against."""
    max_roll_backs: int = 3
    """Spikes of the whole run that are answered with a roll-back; one more stops it."""

    def __post_init__(self) -> None:
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
        require(
            self.spike_factor is None or self.spike_factor > 0,
            "optim.spike_factor",
            self.spike_factor,
            "above 0, or null",
        )
        require(self.spike_window >= 3, "optim.spike_window", self.spike_window, "at least 3 losses")
        require(self.max_roll_backs >= 0, "optim.max_roll_backs", self.max_roll_backs, "0 or more")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "between 0 and 1")
