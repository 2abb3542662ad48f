"""CoPE: half-cosine taper of the slowest pairs, down to 0 for the last one (arXiv 2602.05258).

    theta_j(t) = theta_j(1) * (1 + cos(pi (j - P + n) / (n - 1))) / 2 for the n slowest pairs, at every t

With `clip`, pairs whose period 2 pi / theta_j(1) exceeds L do not rotate at all: training never showed a full period.
A stock config expresses it as `longrope` with the same factors at every length. Shapes: `P` pairs = rotary_dim / 2.
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
class Cope(ScalingMethod):
    """Soft cut-off of the slow pairs; a hard cut-off would ring in the attention scores at long distances."""

    title: ClassVar[str] = "CoPE"

    share: float = 0.3125
    """n / P in (0, 1], rounded to pairs, at least 2; the authors' code tapers 20 of 64."""
    clip: bool = False
    """Stop the pairs whose period exceeds L."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the tapered frequencies; `ConfigError` for a `share` outside (0, 1]."""
        return constant_table(rope.inv_freq.double() * self._weights(rope), t_grid, "cope")

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `longrope` rope type with the inverse weights as factors, and no attention factor."""
        return stock_factors(rope, rope.inv_freq.double() * self._weights(rope), factor)

    def changes(self, factor: float) -> bool:
        """Return True: some pairs slow down at every scale factor."""
        return True

    def _weights(self, rope: Rope) -> Float64[Tensor, " P"]:
        """Return the factor on each frequency, from 1 down to 0."""
        num_pairs = len(rope.inv_freq)
        remedy = f"greater than 0 and at most 1, of 2 pairs or more; this model has {num_pairs}"
        require(0 < self.share <= 1 and num_pairs > 1, f"{self.options_prefix}share", self.share, remedy)
        # The taper starts at 1, so with a single pair nothing would change.
        tapered = max(2, round(self.share * num_pairs))
        weights = torch.ones(num_pairs, dtype=torch.float64)
        angles = torch.linspace(0, math.pi, tapered, dtype=torch.float64)
        weights[num_pairs - tapered :] = (1 + angles.cos()) / 2
        if self.clip:
            weights[2 * math.pi / rope.inv_freq.double() > rope.context_len] = 0
        return weights


METHOD = Cope
