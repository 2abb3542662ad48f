"""The untrained vector field of a run: its kind, its sizes and its drift, by the keys of `scaling`."""

import torch
from jaxtyping import Float64
from torch import Tensor

from clex_train.config.scaling import Drift, ScalingConfig
from clex_train.scaling.clex import Clex
from clex_train.scaling.fields import Shape
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.yarn import ramp_ends

LEAST_RAMP = 1e-3
"""Length of a ramp whose ends fall together, in pairs, as in transformers' formula."""


def new_field(scaling: ScalingConfig, rope: Rope, seed: int = 0) -> Clex:
    """Build the untrained field of a run that starts from `rope`.

    Raises:
        ConfigError: `scaling.drift=yarn` for a model whose config names no base of its frequencies.
    """
    shape = Shape(
        scaling.field.value,
        scaling.t_max,
        scaling.param_factor,
        scaling.act.value,
        scaling.official_ntk_base,
        scaling.tolerance,
        seed,
    )
    return shape.build(rope.inv_freq.detach().double(), drift_shares(scaling.drift, rope))


def drift_shares(drift: Drift, rope: Rope) -> Float64[Tensor, " P"] | None:
    """Return the share of interpolation of each pair in a drift, m in 1 - m + m / t; None for NTK's drift."""
    if drift is Drift.ntk:
        return None
    if drift is Drift.none:
        return rope.inv_freq.detach().double() * 0
    # By the number of the pair and not by its frequency, as in YaRN: so the ramp is the same over a RoPE that the
    # model's own config scales already, which transformers' formula refuses.
    low, high = ramp_ends(rope)
    pairs = torch.arange(len(rope.inv_freq), dtype=torch.float64)
    return ((pairs - low) / max(high - low, LEAST_RAMP)).clamp(0, 1)
