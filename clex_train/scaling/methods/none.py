"""Plain RoPE: the base frequencies at every scale factor (Su et al., arXiv 2104.09864).

    theta_j(t) = theta_j(1)

Shapes: `P` pairs = rotary_dim / 2.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid, constant_table


@dataclass(frozen=True)
class Plain(ScalingMethod):
    """Plain RoPE of the model, for pre-training or for fine-tuning without scaling."""

    title: ClassVar[str] = "plain RoPE"

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the base frequencies at every t."""
        return none_table(rope.inv_freq, t_grid)

    def changes(self, factor: float) -> bool:
        """Return False: the frequencies stay unchanged."""
        return False


def none_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid) -> FrequencyTable:
    """Build a table with the base frequencies at every t."""
    return constant_table(inv_freq, t_grid, "none")


METHOD = Plain
