"""Two ranks that share each row take the step of one rank: its loss, and every gradient."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.sharing_ranks import CASES, save_model
from tests.distributed.sharing_ranks import alone as by_one_process
from tests.helpers.warm_processes import run_ranks

alone = cache(by_one_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The figures of every case, by one run of two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("shared_rows")
    for case in CASES:
        save_model(folder, case)
    script = Path(__file__).with_name("sharing_ranks.py")
    done = run_ranks(2, [str(script), str(folder), *CASES])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_ranks_that_share_rows_is_that_of_one(folder, case):
    shared, expected = load_file(folder / f"{case}.safetensors"), alone(folder, case)
    assert shared.keys() == expected.keys()
    assert float(shared["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((shared[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_outside_of_training_a_row_is_not_shared(folder, case):
    assert torch.isclose(load_file(folder / f"{case}.safetensors")["whole_row"], alone(folder, case)["whole_row"])


def test_the_memory_of_a_part_is_the_one_that_is_planned(folder):
    """Copies of the exchange among it, by a census of the tensors of a real pass."""
    found = json.loads((folder / "memory.json").read_text())
    for moment in ("activations", "logits", "layers"):
        assert found["counted"][moment] == pytest.approx(found["expected"][moment], rel=1e-3), moment
