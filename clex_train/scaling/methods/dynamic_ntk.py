"""Dynamic NTK scaling, `dynamic` in transformers: the base grows with the length n of each call.

    b'(n) = b * (f n/L - f + 1)^(d / (d - 2)),  n = t L

f is the scale factor of the run in training, and t in evaluation unless `dynamic_factor` is set.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid


@dataclass(frozen=True)
class DynamicNtk(ScalingMethod):
    """Dynamic NTK by transformers' formula; plain RoPE for calls of up to L tokens."""

    title: ClassVar[str] = "dynamic NTK"

    dynamic_factor: float | None = None
    """f; None uses the scale factor. 1 is the dynamic NTK of the YaRN paper, 2 is `ntk`."""

    counts_from_context: ClassVar[bool] = True

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return transformers' frequencies for calls of t * L tokens."""
        return rope.stock_table("dynamic_ntk", t_grid, lambda t: self.hf_parameters(rope, t))

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `dynamic` rope type."""
        # The length of a call enters in transformers' formula, so nothing here depends on it.
        return {"rope_type": "dynamic", "factor": float(self.dynamic_factor or factor)}


METHOD = DynamicNtk
