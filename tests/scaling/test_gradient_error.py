"""The gradient through the solver: its distance from that of a solve with sixteen times as many steps."""

import pytest
import torch

from clex_train.scaling.clex import Clex
from clex_train.scaling.fields import LogTimeClex

BASE = 10000.0 ** -(torch.arange(24, dtype=torch.float64) / 24)
BOUND = 100.0
"""Relative error of the gradient, in units of the tolerance of log theta (docs/theory.md)."""


def gradient(clex: Clex, weights: torch.Tensor, t: float) -> torch.Tensor:
    """Return the gradient of a weighted sum of log theta(t) with respect to all weights, float64."""
    clex.zero_grad()
    (clex.inv_freq(t).log() * weights).sum().backward()
    return torch.cat([each.grad.double().flatten() for each in clex.parameters()])


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
@pytest.mark.parametrize(
    ("kind", "act", "size"), [(Clex, "silu", 0.001), (Clex, "tanh", 0.001), (LogTimeClex, "silu", 3.0)]
)
def test_the_gradient_is_as_exact_as_the_solution(kind: type[Clex], act: str, size: float, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    clex = kind(BASE, 32.0, act=act, tolerance=tolerance)
    with torch.no_grad():
        clex.down.normal_(0, size, generator=random)
    clex.refine()
    weights, steps = torch.randn(24, generator=random, dtype=torch.float64), clex.num_steps
    for t in (1.5, 4.0, 32.0):
        clex.num_steps = steps
        found = gradient(clex, weights, t)
        clex.num_steps = 16 * steps
        exact = gradient(clex, weights, t)
        assert 0 < (found - exact).norm() <= BOUND * tolerance * exact.norm()
