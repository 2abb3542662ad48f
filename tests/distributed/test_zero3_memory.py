"""Memory options under ZeRO-3 on two ranks change neither losses nor weights, and gather no weight twice."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.distributed_runs import ROOT
from tests.distributed.zero3_memory import FAMILIES, OPTIONS
from tests.helpers import environments
from tests.helpers.ports import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    script = Path(__file__).with_name("zero3_memory.py")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [sys.executable, *launcher, str(script), str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environments.launch_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_memory_options_keep_losses_and_weights(figures, family: str, name: str) -> None:
    plain, found = figures[f"{family}/plain"], figures[f"{family}/{name}"]
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert plain["moved"] > 1e-3
    assert found["distance"] < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "like"), [("tiled_loss", "plain"), ("tiled_mlp", "plain"), ("all", "recomputed")])
def test_tiling_does_not_gather_sharded_weights_more_often(figures, family: str, name: str, like: str) -> None:
    assert 0 < figures[f"{family}/{name}"]["gathered"] <= figures[f"{family}/{like}"]["gathered"]
