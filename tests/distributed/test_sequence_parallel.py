"""Sequence-parallel training on two ranks, against one rank: loss, every gradient, memory."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import sharing_ranks
from tests.distributed.sharing_ranks import CASES, save_model
from tests.helpers.warm_processes import run_ranks

step_of_one_process = cache(sharing_ranks.step_of_one_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Compute every case in one run of two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("shared_rows")
    for case in CASES:
        save_model(folder, case)
    script = Path(__file__).with_name("sharing_ranks.py")
    done = run_ranks(2, [str(script), str(folder), *CASES])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_parallel_step_of_two_ranks_equals_that_of_one(folder, case):
    shared, expected = load_file(folder / f"{case}.safetensors"), step_of_one_process(folder, case)
    assert shared.keys() == expected.keys()
    assert float(shared["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((shared[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_rows_are_not_sharded_outside_training(folder, case):
    assert torch.isclose(
        load_file(folder / f"{case}.safetensors")["whole_row"], step_of_one_process(folder, case)["whole_row"]
    )


def test_the_memory_of_a_shard_matches_the_plan(folder):
    """Count the tensors of a real pass, including the copies of the all-to-all."""
    found = json.loads((folder / "memory.json").read_text())
    for moment in ("activations", "logits", "layers"):
        assert found["counted"][moment] == pytest.approx(found["expected"][moment], rel=1e-3), moment
