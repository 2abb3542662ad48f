"""Frequency tables in closed form: the base itself, position interpolation, NTK-aware scaling, another base.

    none   theta_j(t) = theta_j(1)
    pi     theta_j(t) = theta_j(1) / t                          (Chen et al., arXiv 2306.15595)
    ntk    theta_j(t) = theta_j(1) * (2t - 1)^(-2j / (d - 2))   (CLEX, arXiv 2310.16450: where CLEX starts)
    theta  theta_j(t) = theta_j(1) * (base / base')^(2j / d)    (Code Llama, arXiv 2308.12950: RoPE at base base')

A model trained at random positions (Ruoss et al., arXiv 2305.16843) is read at plain frequencies and plain positions,
which is `none`. yarn, dynamic and longrope are transformers' (`rope.hf_scalings`).
Shapes: `K` scale factors, `P` pairs = d / 2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clex_train.scaling.table import FrequencyTable, as_grid


def ntk_exponents(num_pairs: int) -> Float64[Tensor, " P"]:
    """2j / (d - 2), which rises from 0 for the fastest pair to 1 for the slowest; 0 for the only pair of d = 2."""
    return torch.arange(num_pairs, dtype=torch.float64) / max(1, num_pairs - 1)


def none_table(inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float]) -> FrequencyTable:
    """The base frequencies at every t."""
    t = as_grid(t_grid)
    return FrequencyTable(t, inv_freq.double().expand(len(t), -1).clone(), method="none")


def pi_table(inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float]) -> FrequencyTable:
    """Position interpolation: t * L positions pressed into L."""
    t = as_grid(t_grid)
    return FrequencyTable(t, inv_freq.double() / t[:, None], method="pi")


def ntk_table(inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float]) -> FrequencyTable:
    """NTK-aware scaling with alpha = 2t - 1: what an untrained CLEX gives."""
    t = as_grid(t_grid)
    factors = (2 * t[:, None] - 1) ** -ntk_exponents(len(inv_freq))
    return FrequencyTable(t, inv_freq.double() * factors, method="ntk")


def theta_table(
    inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float], base: float, new_base: float
) -> FrequencyTable:
    """RoPE of base `base` (rope_theta) turned into one of `new_base`, the same at every t, also at t = 1."""
    t = as_grid(t_grid)
    exponents = torch.arange(len(inv_freq), dtype=torch.float64) / max(1, len(inv_freq))
    changed = inv_freq.double() * (base / new_base) ** exponents
    return FrequencyTable(t, changed.expand(len(t), -1).clone(), method="theta")


TABLES: dict[str, Callable[[Tensor, Tensor | list[float]], FrequencyTable]] = {
    "none": none_table,
    "pi": pi_table,
    "ntk": ntk_table,
}
