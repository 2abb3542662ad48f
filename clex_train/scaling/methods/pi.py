"""Position interpolation: compress t * L positions into L (Chen et al., arXiv 2306.15595).

    theta_j(t) = theta_j(1) / t

`linear` in transformers. Shapes: `P` pairs = rotary_dim / 2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable, as_grid
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid


@dataclass(frozen=True)
class PositionInterpolation(ScalingMethod):
    """Position interpolation: every frequency divided by the scale factor."""

    title: ClassVar[str] = "PI"

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return theta_j(1) / t."""
        return pi_table(rope.inv_freq, t_grid)

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `linear` rope type."""
        return {"rope_type": "linear", "factor": float(factor)}


def pi_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid) -> FrequencyTable:
    """Build the table theta_j(1) / t."""
    t = as_grid(t_grid)
    return FrequencyTable(t, inv_freq.double() / t[:, None], method="pi")


METHOD = PositionInterpolation
