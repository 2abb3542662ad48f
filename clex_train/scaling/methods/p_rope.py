"""p-RoPE: only the fastest share p of the pairs rotates (Barbero et al., arXiv 2410.06205).

    theta_j(t) = theta_j(1) for j < floor(p P), 0 for the slower pairs, at every t

`proportional` in transformers. Shapes: `P` pairs = rotary_dim / 2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid, constant_table
from clex_train.utils.errors import require


@dataclass(frozen=True)
class PRope(ScalingMethod):
    """RoPE without its slowest pairs, which then carry content only."""

    title: ClassVar[str] = "p-RoPE"

    p: float = 0.75
    """Share of the pairs that rotate, in (0, 1)."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the frequencies of the fast pairs and 0 for the others; `ConfigError` if no pair would rotate."""
        return constant_table(self._cut(rope), t_grid, "p_rope")

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `proportional` rope type; `ConfigError` if no pair would rotate."""
        self._cut(rope)
        return {"rope_type": "proportional", "partial_rotary_factor": self.p}

    def changes(self, factor: float) -> bool:
        """Return True: some pairs stop rotating at every scale factor."""
        return True

    def _cut(self, rope: Rope) -> Float[Tensor, " P"]:
        num_pairs = len(rope.inv_freq)
        # Same rounding as transformers' `proportional`, or the table would differ from the exported config by a pair.
        kept = int(self.p * (2 * num_pairs) // 2) if 0 < self.p < 1 else 0
        remedy = f"between 0 and 1, and at least 1/{num_pairs} for the {num_pairs} pairs of this model"
        require(kept > 0, f"{self.options_prefix}p", self.p, remedy)
        inv_freq = rope.inv_freq.double().clone()
        inv_freq[kept:] = 0
        return inv_freq


METHOD = PRope
