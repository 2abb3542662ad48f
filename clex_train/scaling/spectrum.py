"""RoPE frequencies and the rotation they define.

    phase = m * theta_j,    (x_a, x_b) -> (x_a cos - x_b sin, x_b cos + x_a sin)

The phase is formed and reduced in float64: float32 loses 0.004 rad at position 65k and 0.06 rad at a million
(RoPE: Su et al., arXiv 2104.09864). Shapes: `B` batch, `S` sequence, `P` pairs = rotary_dim / 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

# Radians of a whole turn.
TURN = 2 * math.pi
STILL = 1e30
"""`longrope` factor of a pair that does not rotate: JSON has no infinity, and no context reaches 1e30 tokens."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Frequencies used by one call of the model.

    `inv_freq` is theta_j(t) in radians per token, float64 (it may require a gradient). `t >= 1` is its scale factor.
    `attention_factor` multiplies cos and sin (YaRN and LongRoPE have one). `as_used` marks a training step at plain
    positions, as inference reads them.
    """

    inv_freq: Float[Tensor, " P"]
    t: float = 1.0
    attention_factor: float = 1.0
    as_used: bool = False


def ntk_exponents(num_pairs: int) -> Float64[Tensor, " P"]:
    """Return 2j / (d - 2), from 0 for the fastest pair to 1 for the slowest; 0 for the only pair of d = 2."""
    return torch.arange(num_pairs, dtype=torch.float64) / max(1, num_pairs - 1)


def yarn_attention_factor(t: float) -> float:
    """Return YaRN's factor on cos and sin at a scale factor of at least 1: 0.1 ln t + 1 (arXiv 2309.00071)."""
    return 0.1 * math.log(t) + 1


def cos_sin(
    positions: Int[Tensor, "*batch S"] | Float[Tensor, "*batch S"], inv_freq: Float[Tensor, " P"]
) -> tuple[Float[Tensor, "*batch S P"], Float[Tensor, "*batch S P"]]:
    """Compute cos and sin of `positions * inv_freq`, float32, within 5e-7 of exact up to position 2^30.

    Positions are int64 or float64 (sampled ones are fractional). Differentiable in `inv_freq`; the gradient is summed
    over positions in float64.
    """
    # Count in whole turns and drop them in float64, so that float32 sees angles within one turn only.
    turns = positions.to(torch.float64).unsqueeze(-1) * (inv_freq.to(torch.float64) / TURN)
    angle = (turns.frac() * TURN).to(torch.float32)
    return angle.cos(), angle.sin()


def rotate(
    x: Float[Tensor, "*heads S D"], cos: Float[Tensor, "*#heads S P"], sin: Float[Tensor, "*#heads S P"], layout: str
) -> Float[Tensor, "*heads S D"]:
    """Rotate every pair of `x` [..., S, rotary_dim] by its angle; cos and sin broadcast over the leading axes.

    `layout` is the pairing of components: `half` (j, j + P; Llama, GPT-NeoX) or `interleaved` (2j, 2j + 1; GPT-J).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](x, cos, sin)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + P)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j + 1)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]
# By the names that transformers' families use in effect: rotate_half, or GPT-J's rotate_every_two.
LAYOUTS: dict[str, Rotation] = {"half": rotate_half, "interleaved": rotate_interleaved}
