"""Memory of real DeepSpeed engines on two ranks, against the arithmetic of `preflight/memory.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = Path(__file__).with_name("engine_census.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]


@pytest.mark.slow
def test_state_of_every_stage_matches_the_formulas(cases):
    states = [case for case in cases if case["case"].startswith("state")]
    assert len(states) == 12
    for case in states:
        assert case["found"] == pytest.approx(case["expected"], rel=0.02), case["case"]


@pytest.mark.slow
def test_zero_3_keeps_as_many_layers_gathered_as_predicted(cases):
    whole = [case for case in cases if case["case"].startswith("whole")]
    assert len(whole) == 12
    for case in whole:
        assert case["found"] == case["expected"], case["case"]
