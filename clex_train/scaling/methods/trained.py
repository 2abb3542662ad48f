"""The model as it is: the table that it was trained with, or what it computes by itself.

theta(t) = the model's own, plain RoPE where it has none
"""

from dataclasses import dataclass
from typing import ClassVar

from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid
from clex_train.scaling.methods.none import none_table
from clex_train.scaling.table import Frequencies


@dataclass(frozen=True)
class Trained(ScalingMethod):
    """No change to the model."""

    title: ClassVar[str] = "as trained"

    def table(self, rope: Rope, t_grid: TGrid) -> Frequencies:
        """Return the model's own frequencies, which have a grid of their own; without any, plain RoPE on `t_grid`."""
        return none_table(rope.inv_freq, t_grid) if rope.own is None else rope.own


METHOD = Trained
