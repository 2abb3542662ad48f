"""A tracker of a short run, and an evaluation for it."""

import math
from pathlib import Path

from clex_train.config.checkpoint import OnFullDisk
from clex_train.config.root import Config
from clex_train.config.tracking import BackEnd, TrackingConfig
from clex_train.tracking.tracker import Tracker

FIGURES = {"loss": 1.0, "tokens_per_second": 10.0}
RESULTS = {
    "perplexity/trained/one_shot/64": 12.0,
    "perplexity/trained/one_shot/128": 11.5,
    "perplexity/ntk/one_shot/128": math.inf,
    "passkey/trained/128": 0.75,
}


def rows(step: int) -> list[list[object]]:
    """Return the table of `RESULTS`, whose value that is not finite has no row."""
    return [
        [step, "perplexity", "trained", "one_shot", 64, 12.0],
        [step, "perplexity", "trained", "one_shot", 128, 11.5],
        [step, "passkey", "trained", "", 128, 0.75],
    ]


def tracker_of(
    run_dir: Path,
    first_step: int,
    steps: int = 6,
    tracking: TrackingConfig | None = None,
    on_full_disk: str = "stop",
    name: str = "run",
) -> Tracker:
    """Open a tracker, of metrics.jsonl alone by default."""
    config = Config(tracking=tracking or TrackingConfig(name=BackEnd.local), name=name)
    config.checkpoint.on_full_disk = OnFullDisk[on_full_disk]
    config.optim.steps = steps
    return Tracker(config, run_dir, first_step)
