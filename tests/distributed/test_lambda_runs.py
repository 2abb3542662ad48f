"""A whole run under LM-Infinite's mask, from train.py to the evaluation of its final model."""

import json
import subprocess
import sys

import pytest

from tests.distributed.distributed_runs import ROOT
from tests.helpers import environments


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lm_infinite_evaluates_a_model_as_it_was_trained_under_the_mask(launcher):
    """Compare `trained` at the end of the run with `lm_infinite` on its final directory."""
    mask = ("attention=lambda", "attention.n_local=16", "attention.n_global=3", "data.seq_len=64")
    done = launcher.run(1, "under_lambda", *mask, "optim.steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = launcher.folder / "under_lambda"
    during = json.loads(next((folder / "evaluation").glob("step_*.json")).read_text())["metrics"]
    command = [sys.executable, "-m", "clex_train.cli.evaluate", f"run={folder}", "methods=[lm_infinite,trained]"]
    sizes = ["n_local=16", "n_global=3", f"output={launcher.folder / 'after.json'}"]
    done = subprocess.run(
        [*command, *sizes], cwd=ROOT, env=environments.launch_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads((launcher.folder / "after.json").read_text())["metrics"]
    for length in (32, 64, 128):
        masked = during[f"perplexity/trained/one_shot/{length}"]
        assert after[f"perplexity/lm_infinite/one_shot/{length}"] == pytest.approx(masked, rel=1e-4)
    # Without the mask the same weights score differently, so the comparison can fail.
    full, masked = (metrics["perplexity/trained/one_shot/128"] for metrics in (after, during))
    assert abs(full / masked - 1) > 1e-3
