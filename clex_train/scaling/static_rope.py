"""Learned static RoPE: one learned factor per pair at one scale factor, the same frequencies at every length.

    theta_j = theta_j(start) exp(alpha_j),    alpha = 0 at the start

The control of CLEX, which at one fixed t is this formula; LeRoPE (arXiv 2607.10134) learns the same numbers from plain
RoPE. `RampRope` learns the two ends of YaRN's ramp instead. A stock config expresses both. Shapes: `P` pairs =
rotary_dim / 2, `K` scale factors.
"""

import hashlib
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.base import TGrid, constant_table
from clex_train.scaling.solver import SolverReport, UnstableField

STEP = 4.0
"""Pairs that an end of the ramp moves per unit of its parameter, so that a unit means about as much as for a factor."""


class StaticRope(nn.Module):
    """theta [P], trained at the scale factor `factor`; offers what `training.ode_optimizer` needs of a `Clex`."""

    start: Tensor
    num_steps = 1
    """The frequencies are a closed form."""

    def __init__(self, start: Float64[Tensor, " P"], factor: float) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().double().clone())
        self.alpha = nn.Parameter(torch.zeros(len(start)))
        self.t_max = float(factor)

    def moved(self) -> Float64[Tensor, " P"]:
        """Return log theta - log theta(start), differentiable."""
        return self.alpha.double()

    def inv_freq(self, t: float) -> Float64[Tensor, " P"]:
        """Compute theta in radians per token, the same at every `t`; differentiable.

        Raises:
            UnstableField: it is not finite.
        """
        theta: Tensor = self.start * self.moved().exp()
        if not bool(torch.isfinite(theta).all()):
            j = int((~torch.isfinite(theta)).nonzero()[0])
            raise UnstableField(
                f"the learned theta[{j}] is not finite", t, float(theta.detach()[j]), "scaling.lr_scale"
            )
        return theta

    def attention_factor(self, t: float) -> float:
        """Return 1: a factor on cos and sin is part of the architecture that the run trains."""
        return 1.0

    @torch.no_grad()
    def table(self, t_grid: TGrid) -> FrequencyTable:
        """Return the same frequencies at every scale factor of `t_grid` [K], ascending from 1."""
        made = constant_table(self.inv_freq(self.t_max), t_grid, "static")
        return replace(made, digest=self.digest())

    def check_residual(self, max_residual: float) -> float:
        """Return the largest |log theta - log theta(start)|; `UnstableField` if it exceeds `max_residual`."""
        moved = float(self.moved().detach().abs().max())
        # Written so that NaN does not pass.
        if not moved <= max_residual:
            raise UnstableField(
                f"the learned frequencies moved by a factor of e^{moved:.3g}, which exceeds scaling.max_residual="
                f"{max_residual:g}",
                self.t_max,
                moved,
                "scaling.lr_scale or scaling.clip",
            )
        return moved

    def refine(self) -> SolverReport:
        """Report that there is nothing to solve."""
        return SolverReport(self.num_steps, 0.0, 1.0, 0.0)

    def digest(self) -> str:
        """Return a fingerprint of the frequencies."""
        # The factor is left out: the frequencies are the same at every scale factor.
        parts = self.start.numpy().tobytes() + self.alpha.detach().numpy().tobytes()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()


class RampRope(StaticRope):
    """YaRN's frequencies at `factor`, with the two ends of its ramp learned instead of one number a pair.

        theta_j = theta_j(plain) (1 - m_j + m_j / factor),    m_j = clamp((j - a) / (b - a), 0, 1)

    `ends` are (a, b) of YaRN's formula in pairs (arXiv 2309.00071); they move by `STEP` pairs per unit of a parameter.
    """

    plain: Tensor
    ends: Tensor

    def __init__(self, plain: Float64[Tensor, " P"], factor: float, ends: tuple[float, float]) -> None:
        super().__init__(plain, factor)
        self.register_buffer("plain", plain.detach().double().clone())
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.zeros(2))
        # From the ramp itself, so that nothing has moved before the first step, to the bit.
        self.start.copy_(self._frequencies().detach())

    def moved(self) -> Float64[Tensor, " P"]:
        """Return log theta - log theta(start), differentiable."""
        return self._frequencies().log() - self.start.log()

    def _frequencies(self) -> Float64[Tensor, " P"]:
        first, last = self.ends + STEP * self.alpha.double()
        index = torch.arange(len(self.plain), dtype=torch.float64)
        # The ends may cross while they are learned; a ramp of half a pair is a step.
        share = ((index - first) / (last - first).clamp(min=0.5)).clamp(0, 1)
        theta: Tensor = self.plain * (1 - share + share / self.t_max)
        return theta
