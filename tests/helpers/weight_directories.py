"""Model directories with changed weights, judged by the early check of training and by loading."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from clex_train.config.model import ModelConfig
from clex_train.console.errors import explain
from clex_train.models import architecture, load, weights

GATE = "model.layers.0.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewrite(directory: Path, change: Change) -> None:
    """Replace the tensors of a directory by `change(tensors)`."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_tensors(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def refusal_of_check(directory: Path) -> str:
    """Return the error line of the early check of training."""
    model = ModelConfig(path=str(directory))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        weights.check(model, architecture.to_read(model))
    return str(explain(raised.value))


def refusal(directory: Path, **keys) -> str:
    """Return the error line for a directory, which the early check and loading must agree on."""
    model = ModelConfig(path=str(directory), **keys)
    with pytest.raises(ValueError) as checked:  # noqa: PT011  the tests compare the message
        weights.check(model, architecture.to_read(model))
    with pytest.raises(ValueError) as loaded:  # noqa: PT011
        load.load_for_evaluation(model)
    line = explain(checked.value)
    assert line is not None, "shown as the user's mistake, with exit code 2"
    assert line == explain(loaded.value)
    assert str(directory) in line
    return line


def load_accepted(directory: Path, **keys) -> load.LoadedModel:
    """Load a directory that the early check must accept."""
    model = ModelConfig(path=str(directory), **keys)
    weights.check(model, architecture.to_read(model))
    return load.load_for_evaluation(model)
