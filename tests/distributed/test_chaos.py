"""A run whose ranks or launcher are killed at random moments ends bitwise equal to an undisturbed one.

CHAOS_KILLS=20 python -m pytest -m slow -s tests/distributed/test_chaos.py
"""

import json
import os
import time
from collections import Counter

import pytest

from tests.distributed.chaos import last_row, run_with_kills
from tests.helpers.same_models import assert_same_model

KILLS = int(os.environ.get("CHAOS_KILLS", "4"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
STEPS = 12 + 4 * KILLS
OVERRIDES = (
    "scaling=clex",
    "scaling.lr_scale=1.0",
    "scaling.t_max=4",
    "engine.micro_batch=1",
    "checkpoint.every=2",
    "evaluation.every=4",
    "evaluation.lengths=[32,64]",
    "evaluation.num_windows=1",
    "engine.timeout=1",
    f"optim.steps={STEPS}",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * KILLS)]


def test_a_run_killed_at_random_moments_ends_with_the_same_weights_and_rows(launcher):
    assert run_with_kills(launcher, "left_alone", 0, SEED, OVERRIDES) == []
    start = time.monotonic()
    kills = run_with_kills(launcher, "killed", KILLS, SEED, OVERRIDES)
    seconds = time.monotonic() - start
    _report(kills, seconds)
    assert len(kills) == KILLS, "the run was finished before all kills were done"
    assert any(kill.moment == "a save" for kill in kills)
    left_alone, killed = launcher.folder / "left_alone", launcher.folder / "killed"
    assert_same_model(left_alone / "final", killed / "final")
    rows = [
        row for step in launcher.figures("killed", "rows") for first, last in step for row in range(first, last + 1)
    ]
    assert rows == list(range(8 * STEPS)), "every row once, in order"
    for key in ("step", "loss", "t", "grad_norm", "ode_grad_norm", "perplexity/trained/one_shot/64"):
        assert launcher.figures("killed", key) == launcher.figures("left_alone", key), key
    assert last_row(killed)["step"] == STEPS


def _report(kills, seconds: float) -> None:
    """Print the kills and times; shown with `-s`."""
    by_victim, by_moment = Counter(kill.victim for kill in kills), Counter(kill.moment for kill in kills)
    print(f"\n{len(kills)} kills in {seconds:.0f} s, {STEPS} steps, seed {SEED}")
    print(json.dumps({"victims": by_victim, "moments": by_moment}, indent=2))
    for kill in kills:
        print(f"  {kill.victim:<17}{kill.moment:<15}step {kill.step:<4}{kill.seconds:5.1f} s after the launch")
