"""Back end wandb: metrics of each step, and evaluations as a table and as curves over length."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clex_train.config.tracking import TrackingConfig, Wandb
from clex_train.tracking.evaluations import COLUMNS, Curves, curves
from clex_train.tracking.run_id import run_id
from clex_train.utils.errors import ConfigError, require

if TYPE_CHECKING:
    from clex_train.config.root import Config

ID_FILE = "wandb_id"
CLOUDS = ("api.wandb.ai", "api.forge.coreweave.com")


class WandbRun:
    """A run of wandb."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._library = library()
        self._run = self._library.init(
            project=config.tracking.project,
            name=config.name,
            id=run_id(run_dir / ID_FILE),
            resume="allow",
            dir=str(run_dir),
            mode=(config.tracking.wandb or Wandb.offline).value,
            settings=self._library.Settings(console="off", silent=True),
        )
        # Steps after the last checkpoint are repeated on resume. wandb's own step counter cannot go back, a metric can.
        self._run.define_metric("*", step_metric="step")

    def log(self, line: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        self._run.log(line)

    def evaluation(self, step: int, rows: list[list[Any]]) -> None:
        """Log `evaluation/table`, one row per key, and `evaluation/<measure>`, one curve per method."""
        charts = {f"evaluation/{measure}": self._chart(measure, lines) for measure, lines in curves(rows).items()}
        self._run.log({"step": step, "evaluation/table": self._library.Table(columns=COLUMNS, data=rows), **charts})

    def finish(self, exit_code: int) -> None:
        """End the run; a nonzero code marks it as failed."""
        self._run.finish(exit_code=exit_code)

    def _chart(self, measure: str, lines: Curves) -> Any:
        xs, ys = ([[point[i] for point in points] for points in lines.values()] for i in (0, 1))
        return self._library.plot.line_series(xs, ys, keys=list(lines), title=measure, xname="length in tokens")


def require_ready(tracking: TrackingConfig) -> None:
    """Raise `ConfigError` without wandb, or online when nobody is logged in. Uses no prompt and no network."""
    found = library()
    if tracking.wandb is not Wandb.online:
        return
    # `wandb.login` would prompt on a terminal and hang a job without one.
    settings = found.setup().settings
    known = bool(settings.api_key or getattr(settings, "identity_token_file", None))
    require(
        known or _in_netrc(urlsplit(settings.base_url).netloc),
        "tracking.wandb",
        tracking.wandb.value,
        "nobody is logged in to wandb here; run `wandb login`, set WANDB_API_KEY, or take tracking=offline",
    )


def library() -> Any:
    """Import wandb. Raises `ConfigError` where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("tracking", "wandb", "wandb is not installed: pip install wandb") from error
    return wandb


def _in_netrc(host: str) -> bool:
    """Return True if a netrc file, which `wandb login` writes, has a login for the host."""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(file.expanduser())
            # wandb's cloud has two names, and a login under either one is accepted.
            if logins.authenticators(host) or (host in CLOUDS and any(map(logins.authenticators, CLOUDS))):
                return True
    return False
