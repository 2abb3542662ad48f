"""NTK-aware scaling with alpha = 2t - 1, where CLEX starts (CLEX, arXiv 2310.16450).

    theta_j(t) = theta_j(1) * (2t - 1)^(-2j / (d - 2))

It equals a larger base, b' = b * (2t - 1)^(d / (d - 2)), so a stock config needs no rope type.
Shapes: `P` pairs = d / 2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable, as_grid
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid
from clex_train.scaling.spectrum import ntk_exponents


@dataclass(frozen=True)
class NtkAware(ScalingMethod):
    """NTK-aware scaling: the fastest pair keeps its frequency, the slowest is divided by 2t - 1."""

    title: ClassVar[str] = "NTK(2t-1)"

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the frequencies of an untrained CLEX."""
        return ntk_table(rope.inv_freq, t_grid)

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the larger base: b'^(-2j/d) = b^(-2j/d) * (2t - 1)^(-2j/(d-2))."""
        num_pairs = len(rope.inv_freq)
        # With d = 2 the only pair has frequency 1 for any base.
        exponent = num_pairs / (num_pairs - 1) if num_pairs > 1 else 0.0
        return {"rope_theta": rope.theta * (2 * factor - 1) ** exponent}


def ntk_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid) -> FrequencyTable:
    """Build the table of NTK-aware scaling with alpha = 2t - 1, which an untrained CLEX equals."""
    t = as_grid(t_grid)
    factors = (2 * t[:, None] - 1) ** -ntk_exponents(len(inv_freq))
    return FrequencyTable(t, inv_freq.double() * factors, method="ntk")


METHOD = NtkAware
