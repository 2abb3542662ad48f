"""Bitwise comparison of the final models of two runs."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_model(first: Path, second: Path) -> None:
    """Assert that every tensor of two model directories is equal: weights, ODE and frequencies."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert "model.safetensors" in files
    for file in files:
        one, other = load_file(first / file), load_file(second / file)
        assert one.keys() == other.keys(), file
        assert all(torch.equal(one[key], other[key]) for key in one), file
