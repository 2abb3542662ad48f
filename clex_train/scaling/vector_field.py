"""CLEX vector field for the residual y = log theta - log theta_ntk, in u = log(2t - 1).

    dy/du = act( (y + 2 log theta_ntk(u)) W_up ) W_down * e^u / 2
    log theta_ntk(u) = log theta(1) - c u,    c_j = 2j / (d - 2)

The known drift is exact this way, and only the learned part is integrated (CLEX, arXiv 2310.16450).
Shapes: `P` pairs = d / 2, `H` hidden units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clex_train.scaling.spectrum import ntk_exponents

OFFICIAL_BASE = 10000.0

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "tanh": torch.tanh}


@dataclass(frozen=True, eq=False)
class VectorField:
    """dy/du as a callable of (u, y); the network's input is `y + start - u * drift`, affine in u."""

    up: Float64[Tensor, "H P"]
    down: Float64[Tensor, "P H"]
    start: Float64[Tensor, " P"]
    drift: Float64[Tensor, " P"]
    act: Callable[[Tensor], Tensor]

    @classmethod
    def build(cls, up: Float[Tensor, "P H"], down: Float[Tensor, "H P"], start: Tensor, act: str) -> "VectorField":
        """Build the field of weights applied as `x @ up`, `x @ down`.

        `start` [P] is the network's input at u = 0, y = 0.
        """
        drift = 2 * ntk_exponents(up.shape[0]).to(up.device)
        # Transposed once here, not in every evaluation: the gradients of all evaluations then add up without a copy.
        return cls(up.double().t(), down.double().t(), start, drift, ACTIVATIONS[act])

    def __call__(self, u: Tensor, y: Float64[Tensor, " P"]) -> Float64[Tensor, " P"]:
        # u as a Python number saves operations that autograd would record; the ODE lives on the CPU.
        time = float(u)
        read = y + torch.add(self.start, self.drift, alpha=-time)
        return torch.mv(self.down, self.act(torch.mv(self.up, read))) * (0.5 * math.exp(time))


def network_input_start(log_base: Float64[Tensor, " P"], official_ntk_base: bool) -> Float64[Tensor, " P"]:
    """Compute z(1) + log theta_ntk(1), the network's input at the start of the ODE."""
    if not official_ntk_base:
        return 2 * log_base
    # The official code uses base 10000 in the second term whatever the model's base, and its checkpoints expect that.
    pairs = torch.arange(len(log_base), dtype=torch.float64, device=log_base.device)
    return log_base - pairs / len(log_base) * math.log(OFFICIAL_BASE)
