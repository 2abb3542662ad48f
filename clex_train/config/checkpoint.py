"""When checkpoints are written, how, and which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS, require, require_at_most

# One of the words is Python's own, so the class cannot be written out.
OnFullDisk = Enum("OnFullDisk", {"stop": "stop", "continue": "continue"})


MOST = {
    "every": MOST_STEPS,
    "keep_last": MOST_STEPS,
    "keep_every": MOST_STEPS,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class CheckpointConfig:
    every: int = 0
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest complete checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0 keeps none beyond keep_last."""
    overlap: bool = True
    """Copy the state to host memory and write it while training goes on; false writes it before the next step."""
    on_full_disk: OnFullDisk = OnFullDisk.stop
    """A checkpoint or evaluation that finds no room is given up: `stop` the run then, or `continue` without it."""

    def __post_init__(self) -> None:
        require_at_most(self, "checkpoint.", MOST)
        require(self.every >= 0, "checkpoint.every", self.every, "0 or a number of steps")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or a number of steps")
