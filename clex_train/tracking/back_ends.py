"""Back ends that show the metrics of a run, each by its own library in one file.

Adding one takes a member of `config.tracking.BackEnd`, a file with these two things, and a line of the dict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from clex_train.config.tracking import BackEnd, TrackingConfig
from clex_train.tracking import tensorboard, trackio, wandb
from clex_train.utils import distributed

if TYPE_CHECKING:
    from clex_train.config.root import Config


class TrackedRun(Protocol):
    """A run in a back end."""

    def log(self, line: dict[str, Any]) -> None:
        """Log numbers by key; `line` includes `step`, which may have been logged before."""
        ...

    def evaluation(self, step: int, rows: list[list[Any]]) -> None:
        """Show an evaluation as a table and as curves over length; a row has `evaluations.COLUMNS`."""
        ...

    def finish(self, exit_code: int) -> None:
        """Write everything and end; a nonzero code marks the run as failed, if the back end knows that."""
        ...


class Library(NamedTuple):
    """The file of a back end."""

    require_ready: Callable[[TrackingConfig], None]
    """Raises `ConfigError` for a missing library or login."""
    open_run: Callable[[Config, Path, int], TrackedRun]
    """Opens the run of a run folder, or resumes it after a step."""


LIBRARIES = {
    BackEnd.wandb: Library(wandb.require_ready, wandb.WandbRun),
    BackEnd.tensorboard: Library(tensorboard.require_ready, tensorboard.TensorBoardRun),
    BackEnd.trackio: Library(trackio.require_ready, trackio.TrackioRun),
}
"""Back ends by name; `local` has none."""


def require_ready(tracking: TrackingConfig) -> None:
    """Raise `ConfigError` on rank 0 when the library of the back end is missing, or nobody is logged in."""
    if tracking.back_end in LIBRARIES and distributed.is_main():
        LIBRARIES[tracking.back_end].require_ready(tracking)
