"""Unchanged model: the table that it was trained with, or its config's own frequencies.

theta(t) = the model's own, or plain RoPE if it has none
"""

from dataclasses import dataclass
from typing import ClassVar

from clex_train.scaling.frequency_table import Frequencies
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid
from clex_train.scaling.methods.none import none_table


@dataclass(frozen=True)
class Trained(ScalingMethod):
    """Evaluation with the frequencies of training."""

    title: ClassVar[str] = "as trained"

    def table(self, rope: Rope, t_grid: TGrid) -> Frequencies:
        """Return the model's own frequencies on their own grid, or plain RoPE on `t_grid` if it has none."""
        return none_table(rope.inv_freq, t_grid) if rope.own is None else rope.own


METHOD = Trained
