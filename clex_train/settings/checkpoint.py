"""When checkpoints are written and which are kept."""

from __future__ import annotations

from dataclasses import dataclass

from clex_train.settings.bounds import require


@dataclass
class CheckpointConfig:
    every: int = 0
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest complete checkpoints that are kept."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 or a number of steps")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
