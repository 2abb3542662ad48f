"""YaRN: interpolation by frequency, and an attention factor (Peng et al., arXiv 2309.00071).

Pairs that turn often within L keep their frequency, those that turn less than once are divided by t, and a linear ramp
joins the two. cos and sin are multiplied by 0.1 ln t + 1. `yarn` in transformers.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid


@dataclass(frozen=True)
class Yarn(ScalingMethod):
    """YaRN by transformers' formula at factor t and original length L."""

    title: ClassVar[str] = "YaRN"

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return transformers' frequencies and attention factors."""
        return rope.stock_table("yarn", t_grid, lambda t: self.hf_parameters(rope, t))

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `yarn` rope type."""
        return {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": rope.context_len,
        }


def ramp_ends(rope: Rope) -> tuple[float, float]:
    """Return the ends of the ramp in pairs: those that turn 32 times and once within L; `ValueError` without a base."""
    num_pairs = len(rope.inv_freq)

    def pair(turns: float) -> float:
        return num_pairs * math.log(rope.context_len / (turns * 2 * math.pi)) / math.log(rope.theta)

    # Rounded outwards, as in YaRN's code.
    return max(0.0, math.floor(pair(32))), min(2 * num_pairs - 1.0, math.ceil(pair(1)))


METHOD = Yarn
