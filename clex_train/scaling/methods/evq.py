"""EVQ-Cosh: frequencies in closed form, denser among the fast pairs and wider apart among the slow ones.

    theta_j = b^(-phi_j),    phi_j = 1 - asinh((1 - j / P) sinh(tau)) / tau,    tau = d / sqrt(L)

tau = 0 is plain RoPE, b the model's base, d = 2 P. Made for training from scratch; here a control, at every t the same.
A stock config expresses it as `longrope` with equal lists. Shapes: `P` pairs = d / 2.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid, constant_table, stock_factors
from clex_train.utils.errors import require


@dataclass(frozen=True)
class Evq(ScalingMethod):
    """Frequencies that minimise a model of the collisions between pairs; no scale factor enters."""

    title: ClassVar[str] = "EVQ-Cosh"

    tau: float | None = None
    """Strength of the change, above 0 and at most 30; null: d / sqrt(L), the authors' rule."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the closed form at every t; `ConfigError` for a `tau` out of range."""
        return constant_table(self._frequencies(rope), t_grid, "evq")

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `longrope` rope type with the ratio of the frequencies as factors, and no attention factor."""
        return stock_factors(rope, self._frequencies(rope), factor)

    def changes(self, factor: float) -> bool:
        """Return True: the frequencies differ at every scale factor."""
        return True

    def _frequencies(self, rope: Rope) -> Float64[Tensor, " P"]:
        num_pairs = len(rope.inv_freq)
        tau = 2 * num_pairs / math.sqrt(rope.context_len) if self.tau is None else self.tau
        # sinh overflows far beyond any use, and tau = 0 would divide by zero where plain RoPE is meant.
        require(0 < tau <= 30, f"{self.options_prefix}tau", self.tau, "greater than 0 and at most 30")
        share = torch.arange(num_pairs, dtype=torch.float64) / num_pairs
        return rope.theta ** (torch.asinh((1 - share) * math.sinh(tau)) / tau - 1)


METHOD = Evq
