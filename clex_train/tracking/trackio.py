"""Back end trackio: a database on this machine, which `trackio show` serves, or a Space of the Hugging Face hub."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clex_train.config.tracking import TrackingConfig
from clex_train.tracking.evaluations import COLUMNS, Curves, curves, drawn
from clex_train.tracking.run_id import run_id
from clex_train.utils import log, versions
from clex_train.utils.errors import ConfigError, require

if TYPE_CHECKING:
    from clex_train.config.root import Config

ID_FILE = "trackio_id"
"""File in the run folder with the name of the run in trackio, which resumes by name."""

logger = log.get(__name__)


class TrackioRun:
    """A run of trackio, found again by its name."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._library, project, space = library(), config.tracking.project, config.tracking.space
        name = run_id(run_dir / ID_FILE, f"{config.name}-")
        # Standard output has results only, and trackio greets there.
        with redirect_stdout(io.StringIO()):
            self._run = self._library.init(
                project=project,
                name=name,
                space_id=space,
                resume="allow",
                embed=False,
                # Its threads would measure this machine's load all the time.
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        where = f"the Space {space}" if space else f"`trackio show --project {project}`"
        logger.info("%s shows this run as %s", where, name)

    def log(self, line: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def evaluation(self, step: int, rows: list[list[Any]]) -> None:
        """Log `evaluation/table`, one row per key, and `evaluation/<measure>`, an image with one curve per method."""
        images = {f"evaluation/{measure}": self._image(measure, lines) for measure, lines in curves(rows).items()}
        table = self._library.Table(columns=COLUMNS, data=rows)
        self._run.log({"evaluation/table": table, **images}, step=step)

    def finish(self, exit_code: int) -> None:
        """Wait until everything is in the database."""
        with redirect_stdout(io.StringIO()):
            # Not `self._run.finish`: trackio would finish the run once more when the program ends, and say so.
            self._library.finish()

    def _image(self, measure: str, lines: Curves) -> Any:
        import numpy
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(drawn(measure, lines))
        canvas.draw()
        # RGB: the transparency of the fourth channel would show the page's own color.
        return self._library.Image(numpy.asarray(canvas.buffer_rgba())[..., :3].copy(), caption=measure)


def require_ready(tracking: TrackingConfig) -> None:
    """Raise `ConfigError` without trackio, or for a Space when nobody is logged in. Uses no network."""
    library()
    if tracking.space is None:
        return
    from huggingface_hub import get_token

    remedy = "nobody is logged in to Hugging Face here; run `hf auth login`, set HF_TOKEN, or leave the key out"
    require(get_token() is not None, "tracking.space", tracking.space, remedy)


def library() -> Any:
    """Import trackio. Raises `ConfigError` where it is not installed."""
    try:
        import trackio
    except ImportError as error:
        remedy = f"trackio is not installed: {versions.install_command('tracking')}"
        raise ConfigError("tracking", "trackio", remedy) from error
    return trackio
