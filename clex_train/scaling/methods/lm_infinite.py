"""LM-Infinite: frequencies that go with the mask of `lm_infinite/` (Han et al., arXiv 2308.16137).

    theta(t) = theta(1), or the model's own frequencies at one fixed t

A method of evaluation only; `attention=lambda` trains under the mask. Shapes: `K` scale factors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clex_train.scaling.frequency_table import Frequencies, FrequencyTable, as_grid
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid
from clex_train.scaling.methods.none import none_table
from clex_train.utils.errors import ConfigError


@dataclass(frozen=True)
class LmInfiniteFrequencies(ScalingMethod):
    """Same frequencies at every t; the mask keeps distances within the trained range."""

    title: ClassVar[str] = "LM-Infinite"

    lm_infinite_t: float = 1.0
    """Scale factor in the model's own table; 1 is plain RoPE."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return plain RoPE, or the model's own frequencies at `lm_infinite_t`; `ConfigError` if it has none there."""
        if self.lm_infinite_t == 1:
            return none_table(rope.inv_freq, t_grid)
        return _fixed_at(self.lm_infinite_t, rope.own, as_grid(t_grid))


def _fixed_at(fixed_t: float, own: Frequencies | None, t: Tensor) -> FrequencyTable:
    """Repeat the model's own frequencies at `fixed_t` for every scale factor of `t` [K]."""
    assert own is not None, "evaluation.methods refuses this for a model without frequencies of its own"
    try:
        spectrum = own.at(fixed_t)
    except ValueError as error:
        raise ConfigError("lm_infinite_t", f"{fixed_t:g}", str(error)) from error
    factors = torch.full((len(t),), spectrum.attention_factor, dtype=torch.float64)
    return FrequencyTable(t, spectrum.inv_freq.expand(len(t), -1).clone(), "held", attention_factors=factors)


METHOD = LmInfiniteFrequencies
