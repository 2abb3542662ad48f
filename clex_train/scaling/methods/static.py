"""Learned static RoPE: d/2 frequencies trained with the model at one scale factor, from those of a formula.

    theta_j = theta_j(start) exp(alpha_j)

The control of CLEX and the simplest learned scaling (LeRoPE, arXiv 2607.10134); the scalars are in
`scaling/static_rope.py`. A stock config expresses them as `longrope` with equal lists. Shapes: `P` pairs.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid, constant_table, stock_factors
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.yarn import Yarn, ramp_ends
from clex_train.scaling.spectrum import yarn_attention_factor
from clex_train.scaling.static_rope import RampRope, StaticRope
from clex_train.utils.errors import require


class Learn(Enum):
    """Numbers that are learned."""

    factors = "factors"
    ramp = "ramp"


class Start(Enum):
    """Formulas whose frequencies learning starts from."""

    yarn = "yarn"
    ntk = "ntk"
    none = "none"


@dataclass(frozen=True)
class Static(ScalingMethod):
    """One learned factor a pair, at the learning rate `scaling.lr_scale` times the model's."""

    title: ClassVar[str] = "learned static RoPE"

    start: Start = Start.yarn
    """Start of the frequencies at the run's factor: `yarn` (by parts), `ntk`, or `none`, plain RoPE."""
    learn: Learn = Learn.factors
    """`factors`, one a pair; or `ramp`, the two ends of YaRN's ramp between pairs that it keeps and interpolates."""
    attention_factor: float | None = None
    """Constant factor on cos and sin, above 0; null: the start's own, 0.1 ln(factor) + 1 for YaRN and 1 otherwise."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the start at the largest scale factor of `t_grid`, at every t."""
        return constant_table(self._start(rope, float(max(t_grid))), t_grid, "static")

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `longrope` rope type with the start's factors, the same up to L and beyond."""
        own = yarn_attention_factor(factor) if self.start is Start.yarn else 1.0
        chosen = own if self.attention_factor is None else self.attention_factor
        require(chosen > 0, f"{self.options_prefix}attention_factor", chosen, "a number greater than 0")
        return stock_factors(rope, self._start(rope, factor), factor, chosen)

    def changes(self, factor: float) -> bool:
        """Return True if the start differs from plain RoPE."""
        return factor > 1 and self.start is not Start.none

    def module(self, rope: Rope, factor: float) -> StaticRope:
        """Build what the run trains, at the start; `ConfigError` for a ramp that would not start from YaRN's."""
        if self.learn is Learn.factors:
            return StaticRope(self._start(rope, factor), factor)
        remedy = "learn=ramp starts from yarn, whose ramp it is; leave start out"
        require(self.start is Start.yarn, f"{self.options_prefix}start", self.start.value, remedy)
        return RampRope(rope.inv_freq.double(), factor, ramp_ends(rope))

    def _start(self, rope: Rope, factor: float) -> Float64[Tensor, " P"]:
        """Return the frequencies that learning starts from."""
        plain = rope.inv_freq.double()
        if self.start is Start.none or factor == 1:
            return plain
        made = Yarn().table(rope, [1.0, factor]) if self.start is Start.yarn else ntk_table(plain, [1.0, factor])
        # float32 of transformers' formula would otherwise move even the pairs that YaRN keeps.
        near = (made.inv_freq[1] / plain - 1).abs() < 1e-6
        return torch.where(near, plain, made.inv_freq[1])


METHOD = Static
