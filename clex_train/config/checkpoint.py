"""Config group `checkpoint`: when to write checkpoints, and which to keep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_STEPS
from clex_train.utils.errors import require, require_at_most

# `continue` is a keyword of Python, so the class statement cannot spell it.
OnFullDisk = Enum("OnFullDisk", {"stop": "stop", "continue": "continue"})


MOST = {
    "every": MOST_STEPS,
    "keep_last": MOST_STEPS,
    "keep_every": MOST_STEPS,
}
"""Upper bounds that catch typing errors."""


@dataclass
class CheckpointConfig:
    """The `checkpoint` group: when to save, what to keep."""

    every: int = 0
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Newest complete checkpoints to keep, at least 1."""
    keep_every: int = 0
    """Keep checkpoints whose step is a multiple of this forever; 0: none beyond keep_last."""
    overlap: bool = True
    """Copy the state to host memory and write it while training continues; false: write before the next step."""
    on_full_disk: OnFullDisk = OnFullDisk.stop
    """On a full disk, drop the checkpoint or evaluation and `stop` the run, or `continue` without it."""

    def __post_init__(self) -> None:
        require_at_most(self, "checkpoint.", MOST)
        require(self.every >= 0, "checkpoint.every", self.every, "0 or a number of steps")
        # At least one: with none, a crash while writing would lose the run.
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or a number of steps")
