"""Models of two runs that have to be the same to the bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_model(first: Path, second: Path) -> None:
    """Compare every tensor that two model directories hold: weights, ODE and frequencies."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert "model.safetensors" in files
    for file in files:
        one, other = load_file(first / file), load_file(second / file)
        assert one.keys() == other.keys(), file
        assert all(torch.equal(one[key], other[key]) for key in one), file
