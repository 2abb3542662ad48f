"""A non-finite loss on one of two ranks: both skip the step, and the report names the rank and rows."""

import json
import math
from pathlib import Path

import pytest

from tests.helpers.warm_processes import run_ranks


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_both_ranks_skip_the_step_and_name_the_rank_and_its_rows(launcher, stage: int) -> None:
    name = f"bad_{stage}"
    script = str(Path(__file__).with_name("spoilt_rank.py"))
    overrides = (
        "scaling=clex",
        "engine.micro_batch=2",
        f"engine.zero_stage={stage}",
        "optim.steps=5",
        "evaluation=never",
    )
    # Micro batches have two rows: step 3 reads rows 16 to 23, and rank 1 reads 22 and 23 in its second one.
    done = run_ranks(2, [script, "22", *launcher.program(name, *overrides)[1:]])
    assert done.returncode == 0, done.stderr[-3000:]
    written = map(json.loads, (launcher.folder / name / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in written if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[2]["loss"] is None
    assert lines[2]["fault"] == "rank 1, rows [[22, 23]]: first in the output of model.layers.0.mlp"
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 3)
