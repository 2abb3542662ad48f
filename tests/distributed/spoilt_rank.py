"""Run train.py with an MLP that breaks on one row, which one of the ranks reads; the row is the first argument."""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from clex_train.data.batch import MicroBatch
from clex_train.training.step import ForwardPass
from clex_train.utils import log
from tests.helpers.composing import composed

ROW = int(sys.argv.pop(1))
original_loss = ForwardPass.loss


def loss_with_nan(self: ForwardPass, model: Any, batch: MicroBatch, weight: float) -> Any:
    """Make the output of the first MLP NaN for the row."""
    bad = ROW in batch.row_indices.tolist()
    mlp: Any = getattr(model, "module", model).get_submodule("model.layers.0.mlp")
    hook = mlp.register_forward_hook(lambda module, inputs, out: out * (math.nan if bad else 1.0), prepend=True)
    try:
        return original_loss(self, model, batch, weight)
    finally:
        hook.remove()


if __name__ == "__main__":
    ForwardPass.loss = loss_with_nan  # type: ignore[method-assign]
    log.setup()
    train.run(composed(*sys.argv[1:]))
