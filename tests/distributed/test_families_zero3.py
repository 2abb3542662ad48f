"""CLEX training of every experiment's model family under ZeRO-3 on two ranks, against replicated training."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.distributed_runs import ROOT
from tests.distributed.zero3_families import FAMILIES
from tests.helpers import environments
from tests.helpers.ports import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory, goldens: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    script = Path(__file__).with_name("zero3_families.py")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [sys.executable, *launcher, str(script), str(folder), str(goldens)]
    done = subprocess.run(
        command, cwd=ROOT, env=environments.launch_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("family", [*FAMILIES, "official"])
def test_three_clex_steps_under_zero3_match_replicated_training(figures, family: str) -> None:
    replicated, sharded = figures[f"{family}/0"], figures[f"{family}/3"]
    assert len(sharded["losses"]) == 3
    assert all(math.isfinite(loss) for loss in sharded["losses"])
    assert sharded["losses"] == pytest.approx(replicated["losses"], rel=1e-5)
    assert sharded["ode_grad_norms"] == pytest.approx(replicated["ode_grad_norms"], rel=1e-3)
    assert all(norm > 0 for norm in sharded["ode_grad_norms"])
    assert sharded["untouched"] == []


def test_the_experts_of_mixtral_are_trained(figures) -> None:
    assert figures["mixtral/3"]["experts"]
    assert figures["mixtral/3"]["untouched"] == []
