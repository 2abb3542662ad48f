"""The untrained vector field of a run: its kind, its sizes and its drift, by the keys of `scaling`."""

from jaxtyping import Float64
from torch import Tensor

from clex_train.config.scaling import Drift, ScalingConfig
from clex_train.scaling.clex import Clex
from clex_train.scaling.fields import Shape
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.yarn import Yarn
from clex_train.utils.errors import require


def new_field(scaling: ScalingConfig, rope: Rope, seed: int = 0) -> Clex:
    """Build the untrained field of a run that starts from `rope`.

    Raises:
        ConfigError: `scaling.drift=yarn` for a RoPE that YaRN's formula does not start from.
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
    # YaRN's ramp does not depend on t, so transformers' frequencies at t = 2 give it: theta(2) / theta(1) = 1 - m / 2.
    theta = Yarn().table(rope, [1.0, 2.0]).inv_freq
    shares = 2 * (1 - theta[1] / theta[0])
    require(bool((shares > -1e-5).all()), "scaling.drift", "yarn", "YaRN would speed pairs up on this model; use ntk")
    return shares.clamp(0, 1)
