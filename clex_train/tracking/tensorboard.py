"""Back end TensorBoard: event files in the run folder, which `tensorboard --logdir runs` shows without an account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clex_train.config.tracking import TrackingConfig
from clex_train.tracking.evaluations import COLUMNS, curves, drawn
from clex_train.utils import log, versions
from clex_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from clex_train.config.root import Config

FOLDER = "tensorboard"
"""Name in the run folder."""

logger = log.get(__name__)


class TensorBoardRun:
    """Event files of a run: a scalar for each metric, and evaluations as a table in markdown and as figures."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._folder, self._step, self._is_broken = str(run_dir / FOLDER), first_step, False
        self._writer = self._opened()
        logger.info("`tensorboard --logdir %s` shows this run", self._folder)

    def log(self, line: dict[str, Any]) -> None:
        """Write the metrics of a step; one that was written before replaces itself and all later ones."""
        step = line["step"]
        if step < self._step:
            # The run went back to a checkpoint, and TensorBoard would draw the old steps as well.
            self._writer.close()
            self._step = step - 1
            self._writer = self._opened()
        self._step = step
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._write(self._writer.add_scalar, key, value)

    def evaluation(self, step: int, rows: list[list[Any]]) -> None:
        """Write `evaluation/table`, one row per key, and `evaluation/<measure>`, a figure with one curve per method."""
        # Markdown, since TensorBoard has no table of its own.
        cells = [COLUMNS, ["---"] * len(COLUMNS), *([str(cell) for cell in row] for row in rows)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        self._step = step
        self._write(self._writer.add_text, "evaluation/table", table)
        for measure, lines in curves(rows).items():
            # Not closed by TensorBoard: that is pyplot's, which does not know these figures.
            self._write(self._writer.add_figure, f"evaluation/{measure}", drawn(measure, lines), close=False)
        self._write(self._writer.flush)

    def finish(self, exit_code: int) -> None:
        """Close the files."""
        self._write(self._writer.close)

    def _opened(self) -> Any:
        # Readers drop the events from `purge_step` on: steps after the last checkpoint are repeated.
        return library()(self._folder, purge_step=self._step + 1)

    def _write(self, call: Callable[..., None], *what: Any, **options: Any) -> None:
        """Make a call of the writer, unless an earlier one failed. Its thread reports a full disk to a later call."""
        if self._is_broken:
            return
        takes_step = call.__name__.startswith("add_")
        try:
            call(*what, **({"global_step": self._step} if takes_step else {}), **options)
        except OSError as error:
            # metrics.jsonl has the same numbers, and its own rule for a full disk.
            self._is_broken = True
            logger.error("%s: cannot be written (%s); TensorBoard gets nothing more", self._folder, error.strerror)


def require_ready(tracking: TrackingConfig) -> None:
    """Raise `ConfigError` without TensorBoard; it needs no login."""
    library()


def library() -> Any:
    """Import TensorBoard and return its writer, which torch has. Raises `ConfigError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = f"TensorBoard is not installed: pip install tensorboard, or {versions.install_command('tracking')}"
        raise ConfigError("tracking", "tensorboard", remedy) from error
    return SummaryWriter
