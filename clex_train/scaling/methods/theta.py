"""RoPE at a larger base, as Code Llama was fine-tuned with (Roziere et al., arXiv 2308.12950).

    theta_j(t) = theta_j(1) * (b / b')^(2j / d)

Shapes: `P` pairs = d / 2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid, constant_table
from clex_train.utils.errors import require


@dataclass(frozen=True)
class LargerBase(ScalingMethod):
    """RoPE with a larger base: the same frequencies at every t, t = 1 included."""

    rope_theta: float = 1e6
    """b', which replaces the model's base."""

    title: ClassVar[str] = "theta"

    @property
    def label(self) -> str:
        """Name of the method in tables and figures."""
        # 1e6, as users write it in the config, for the 1e+06 of Python.
        return f"{self.title} {self.rope_theta:g}".replace("e+0", "e")

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return plain RoPE at base `rope_theta`."""
        return theta_table(rope.inv_freq, t_grid, rope.theta, self.rope_theta)

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the new base; `ConfigError` unless it is larger than the model's."""
        key, remedy = f"{self.prefix}rope_theta", f"the model has {rope.theta:g} already; name a larger one"
        require(self.rope_theta > rope.theta, key, self.rope_theta, remedy)
        return {"rope_theta": float(self.rope_theta)}

    def changes(self, factor: float) -> bool:
        """Return True: the base differs at every scale factor."""
        return True


def theta_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid, base: float, new_base: float) -> FrequencyTable:
    """Build the table of RoPE with base `new_base` from frequencies of base `base`, the same at every t."""
    exponents = torch.arange(len(inv_freq), dtype=torch.float64) / max(1, len(inv_freq))
    return constant_table(inv_freq.double() * (base / new_base) ** exponents, t_grid, "theta")


METHOD = LargerBase
