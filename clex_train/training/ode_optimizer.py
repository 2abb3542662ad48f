"""The ODE's own training step, outside the DeepSpeed engine.

    begin       draw t, solve for theta(t), detach it as a leaf that every layer and micro-batch of the step shares
    gradient    return the gradient that the step's backward passes left on the leaf, to be averaged over the ranks
    finish      run the one backward pass through the ODE with that, clip, step
    prefetch    solve for the next step; like `finish` on the host, while the device updates the weights

The ODE is small, float32 and replicated on the CPU of each rank, so neither the engine's bf16 cast nor its global
gradient norm touches it. (CLEX, arXiv 2310.16450; design in docs/mathematics.md.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from clex_train.data.position_sampling import draw_t, is_as_used
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.solver import UnstableField
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils import distributed, log

if TYPE_CHECKING:
    from clex_train.config.scaling import ScalingConfig
    from clex_train.scaling.clex import Clex
    from clex_train.scaling.static_rope import StaticRope

logger = log.get(__name__)


class OdeOptimizer:
    """Trains a `Clex` outside the engine: `spectrum = begin(step)`, forwards and backwards, then `finish(lr)`.

    `t_as_used` is the t of the steps that `scaling.as_used` takes out of the draw (`ScalingConfig.t_as_used`). With
    `fixed_t`, no step draws t: a `StaticRope` has one scale factor.
    """

    def __init__(
        self,
        clex: Clex | StaticRope,
        config: ScalingConfig,
        seed: int,
        t_as_used: float = 1.0,
        fixed_t: float | None = None,
    ) -> None:
        self.clex = clex
        self.t_as_used, self.fixed_t = t_as_used, fixed_t
        self.config = config
        self.seed = seed
        self.learns = config.lr_scale > 0
        self.adamw = torch.optim.AdamW(clex.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self._solved: torch.Tensor | None = None
        self._leaf: torch.Tensor | None = None
        self._ahead: tuple[int, torch.Tensor] | None = None
        """A later step and its solution with the current parameters."""

    def begin(self, step: int) -> Spectrum:
        """Return the frequencies of optimizer step `step`; gradients are collected if the field learns.

        Every rank uses rank 0's solution. `UnstableField` if the field has left its bounds or outgrown its grid.
        """
        if step % self.config.check_every == 0:
            self.check(step)
        ahead, self._ahead = self._ahead, None
        self._solved = ahead[1] if ahead and ahead[0] == step else self._solve(step)
        self._leaf = distributed.broadcast_to_device(self._solved.detach()).requires_grad_(self.learns)
        t = self._t(step)
        return Spectrum(self._leaf, t, self.clex.attention_factor(t), as_used=self._is_as_used(step))

    def prefetch(self, step: int) -> None:
        """Solve for `step` already; `begin` takes the same bits. Does nothing where the grid is checked first."""
        if step % self.config.check_every == 0:
            return
        try:
            self._ahead = (step, self._solve(step))
        except UnstableField:
            # `begin` finds it again, in the step that it belongs to.
            self._ahead = None

    def gradient(self) -> torch.Tensor:
        """Return the gradient of this rank's backward passes: float64 [P] on the device; empty if frozen."""
        assert self._leaf is not None
        if not self.learns:
            return self._leaf.new_zeros(0)
        assert self._leaf.grad is not None, "no gradient reached the frequencies: is the rotary module installed?"
        return self._leaf.grad

    def update(self, step: int, model_lr: float, gradient: torch.Tensor, apply: bool) -> dict[str, float]:
        """Call `finish` for `step` and `prefetch` for the next one; return `t` and `ode_grad_norm` for the log."""
        norm = self.finish(model_lr, gradient, apply)
        self.prefetch(step + 1)
        return {"t": self._t(step), "ode_grad_norm": norm}

    def finish(self, model_lr: float, gradient: torch.Tensor | None = None, apply: bool = True) -> float:
        """Update the ODE by `gradient`, a mean over ranks; return the norm of the field's own gradient.

        By default the mean is taken here, collectively. Without `apply` the field stays as it was, because the engine
        has skipped its own update of this step.
        """
        assert self._solved is not None
        if not self.learns:
            return 0.0
        mean = distributed.all_reduce_mean(self.gradient()) if gradient is None else gradient
        self.adamw.zero_grad(set_to_none=True)
        torch.autograd.backward(self._solved, mean.to(self._solved))
        norm = float(torch.nn.utils.clip_grad_norm_(self.clex.parameters(), self.config.clip))
        self._solved = self._leaf = None
        if apply and math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = model_lr * self.config.lr_scale
            self.adamw.step()
        return norm

    def verify(self) -> None:
        """Raise `UnstableField` if the field is not finite, too stiff or out of bounds. Collective."""
        self.sync_from_rank0()
        self.clex.check_residual(self.config.max_residual)
        self.clex.table(scale_grid(self.clex.t_max))

    def check(self, step: int) -> float:
        """Fit the solver's grid to the current field; returns the largest residual |log theta - log theta_ntk|.

        Collective. Raises `UnstableField` if the field is not finite, too stiff, or larger than `scaling.max_residual`.
        """
        self.sync_from_rank0()
        self._ahead = None
        before, limit = self.clex.num_steps, self.config.max_residual
        report = self.clex.refine()
        if report.num_steps > before:
            logger.info("step %d: the ODE needs a finer grid: %s", step, report)
        residual = self.clex.check_residual(limit)
        if residual > limit / 2:
            logger.warning(
                "step %d: the field has moved log theta by %.2f of scaling.max_residual=%g; lower scaling.lr_scale",
                step,
                residual,
                limit,
            )
        return residual

    def sync_from_rank0(self) -> None:
        """Broadcast rank 0's parameters, so that rounding on different processors cannot let the ranks drift apart.

        Collective, and not needed in every step: every rank uses the solution of rank 0's parameters.
        """
        vector = torch.nn.utils.parameters_to_vector(self.clex.parameters()).detach()
        torch.nn.utils.vector_to_parameters(distributed.broadcast(vector), self.clex.parameters())

    def _is_as_used(self, step: int) -> bool:
        return is_as_used(self.seed, step, self.config.as_used)

    def _t(self, step: int) -> float:
        if self.fixed_t is not None:
            return self.fixed_t
        if self._is_as_used(step):
            return self.t_as_used
        return draw_t(self.seed, step, self.config.t_max, self.config.t_distribution.value)

    def _solve(self, step: int) -> torch.Tensor:
        with torch.set_grad_enabled(self.learns):
            return self.clex.inv_freq(self._t(step))

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, the solver's grid and the optimizer's moments."""
        return {"clex": self.clex.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._ahead = None
        self.clex.load_state_dict(state["clex"])
        self.adamw.load_state_dict(state["adamw"])


class FixedFrequencies:
    """Stands in for `OdeOptimizer` in a run that learns no frequencies: the model's own, or those of a formula."""

    def __init__(self, spectrum: Spectrum | None = None, as_used: float = 0.0, seed: int = 0) -> None:
        self.spectrum = spectrum
        """Spectrum of the formula; None for the model's own frequencies."""
        self._share, self._seed = as_used, seed

    def begin(self, step: int) -> Spectrum | None:
        """Return the same frequencies in every step, marked in the steps that train plain positions."""
        if self.spectrum is None:
            return None
        return replace(self.spectrum, as_used=is_as_used(self._seed, step, self._share))

    def gradient(self) -> torch.Tensor:
        """Return an empty gradient."""
        return torch.zeros(0, dtype=torch.float64, device=distributed.device())

    def update(self, step: int, model_lr: float, gradient: torch.Tensor, apply: bool) -> dict[str, float]:
        """Return no figures."""
        return {}

    def sync_from_rank0(self) -> None:
        """Leave the ranks alone: they have nothing to differ in."""

    def verify(self) -> None:
        """Accept: frequencies that do not move stay usable."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, of which checkpoints have no file."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state of a checkpoint, in which only a spike watch's can be."""
