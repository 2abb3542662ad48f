"""CLEX: the RoPE frequencies as a learned ODE over the scale factor t.

    d log theta / dt = act( (log theta + log theta_ntk(t)) W_up ) W_down + d log theta_ntk / dt

(arXiv 2310.16450). Parameters are float32; the ODE is solved in float64, see `vector_field` and `solver`. The module
lives on the CPU, outside the training engine. Shapes: `P` pairs = d / 2, `H` hidden units, `K` scale factors.
"""

import hashlib
import math
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from clex_train.scaling import solver
from clex_train.scaling.frequency_table import FrequencyTable, as_grid, scale_grid
from clex_train.scaling.solver import Field, SolverReport, UnstableField
from clex_train.scaling.spectrum import ntk_exponents
from clex_train.scaling.vector_field import ACTIVATIONS, VectorField, network_input_start
from clex_train.utils.seeding import generator

Grid = Tensor | list[float] | tuple[float, ...]
# Number of intervals in [1, t_max] at whose ends the size of the learned part is checked.
CHECK_POINTS = 32


class Clex(nn.Module):
    """theta(t) for t in [1, t_max], starting from the base model's frequencies `inv_freq` [P].

    `up` [P, H] starts uniform in +-1/sqrt(H) and `down` [H, P] at zero, H = param_factor * d, so an untrained CLEX is
    NTK(2t - 1). `official_ntk_base` feeds the network log theta_ntk at base 10000, as the released checkpoints expect.
    `tolerance` bounds the solver's error in log theta.

    Raises:
        ValueError: an argument is out of range, by name.
    """

    kind: ClassVar[str] = "paper"
    """Name of the vector field, `scaling.field`."""
    base_inv_freq: Tensor
    steps: Tensor

    def __init__(
        self,
        inv_freq: Float[Tensor, " P"],
        t_max: float,
        param_factor: float = 1.0,
        act: str = "silu",
        official_ntk_base: bool = False,
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_arguments(inv_freq, t_max, param_factor, act, tolerance)
        num_pairs = len(inv_freq)
        hidden = max(1, round(param_factor * 2 * num_pairs))
        # A generator of its own, so that the initial field does not depend on other modules being built first.
        draw = generator(seed, "clex_init").uniform(-1, 1, (num_pairs, hidden)) / math.sqrt(hidden)
        self.up = nn.Parameter(torch.from_numpy(draw).to(torch.float32))
        self.down = nn.Parameter(torch.zeros(hidden, num_pairs))
        self.register_buffer("base_inv_freq", inv_freq.detach().to(torch.float64, copy=True))
        # A buffer, so part of the state: after a resume the solve takes the same steps as in an uninterrupted run.
        self.register_buffer("steps", torch.tensor(solver.MIN_STEPS))
        self.t_max, self.act = float(t_max), act
        self.official_ntk_base, self.tolerance = official_ntk_base, tolerance

    @property
    def drift_name(self) -> str:
        """Name of the known path, `scaling.drift`."""
        return "ntk"

    @property
    def num_steps(self) -> int:
        """RK4 steps from t = 1 to t_max, as the last `refine` chose them."""
        return int(self.steps)

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"num_steps={value}: must be at least 1")
        self.steps.fill_(value)

    def inv_freq(self, t: float) -> Float64[Tensor, " P"]:
        """Compute theta(t) in radians per token, differentiable in the parameters.

        Raises:
            UnstableField: it is not finite.
        """
        grid = self._checked([t])
        return self._inv_freq(grid, self._solve(grid, self.num_steps))[0]

    def learned(self, t_grid: Grid) -> Float64[Tensor, "K P"]:
        """Compute log theta - log theta_ntk, the learned part, at ascending scale factors; differentiable."""
        return self._solve(self._checked(t_grid), self.num_steps)

    @torch.no_grad()
    def table(self, t_grid: Grid) -> FrequencyTable:
        """Solve for theta on a grid that starts at 1, within `tolerance`, in one solve of the current weights' ODE."""
        t = self._checked(t_grid)
        # Steps chosen afresh, with `num_steps` left alone: looking at a run must not change it.
        inv_freq = self._inv_freq(t, self._solve(t, self._assess().num_steps))
        factors = torch.tensor([self.attention_factor(each) for each in t.tolist()], dtype=torch.float64)
        return FrequencyTable(
            t, inv_freq.cpu(), "clex", digest=self.digest(), attention_factors=None if (factors == 1).all() else factors
        )

    def attention_factor(self, t: float) -> float:
        """Return the factor on cos and sin at `t`: 1, as in the paper."""
        return 1.0

    def drift(self, t: Float64[Tensor, " K"]) -> Float64[Tensor, "K P"]:
        """Compute log theta(1) - log theta(t) of the known path, NTK's: log(2t - 1) 2j / (d - 2)."""
        return (2 * t[:, None] - 1).log() * ntk_exponents(len(self.base_inv_freq))

    @torch.no_grad()
    def residual(self, t_grid: Grid) -> Float64[Tensor, " K"]:
        """Compute max_j |log theta_j - log theta_ntk_j| at each t: the distance of the field from NTK."""
        return self.learned(t_grid).abs().amax(dim=1)

    def check_residual(self, max_residual: float) -> float:
        """Return the largest `residual` in [1, t_max].

        Raises:
            UnstableField: it exceeds `max_residual`; names the first such t.
        """
        t = scale_grid(self.t_max, step=(self.t_max - 1) / CHECK_POINTS if self.t_max > 1 else 1.0)
        moved = self.residual(t)
        beyond = (moved > max_residual).nonzero().flatten().tolist()
        if beyond:
            at, value = float(t[beyond[0]]), float(moved[beyond[0]])
            raise UnstableField(
                f"the CLEX field moved log theta by {value:.3g} at t={at:.3g}, which exceeds scaling.max_residual="
                f"{max_residual:g}",
                at,
                value,
                "scaling.lr_scale or scaling.clip",
            )
        return float(moved.max())

    @torch.no_grad()
    def refine(self) -> SolverReport:
        """Choose `num_steps` for the current weights by step doubling; `UnstableField` if the field is too stiff."""
        report = self._assess()
        self.steps.fill_(report.num_steps)
        return report

    def digest(self) -> str:
        """Return a fingerprint of everything that theta(t) depends on."""
        parts = hashlib.blake2b(f"{self.act} {self.official_ntk_base}".encode(), digest_size=16)
        for tensor in (self.base_inv_freq, *self.parameters()):
            parts.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return parts.hexdigest()

    def _field(self) -> Field:
        """Return dy/du of the current weights."""
        start = network_input_start(self.base_inv_freq.log(), self.official_ntk_base)
        return VectorField.build(self.up, self.down, start, self.act)

    def _bounded(self, y: Float64[Tensor, "*K P"]) -> Float64[Tensor, "*K P"]:
        """Map the solution of the ODE to the learned part of log theta: the same, as in the paper."""
        return y

    def _require_finite(self) -> None:
        for name, weight in self.named_parameters():
            # Checked before the solve: NaN weights would otherwise look like a stiff field.
            if not bool(torch.isfinite(weight).all()):
                index = (~torch.isfinite(weight)).nonzero()[0].tolist()
                value = float(weight.detach()[tuple(index)])
                raise UnstableField(f"CLEX weight {name}{index}={value}: not finite", 1.0, value, "scaling.lr_scale")

    def _solve(self, t: Tensor, num_steps: int) -> Tensor:
        self._require_finite()
        # A zero that depends on trained weights keeps the solution at t = 1 in the graph, where its gradient is zero.
        trained = [weight for weight in self.parameters() if weight.requires_grad] or [self.down]
        start = torch.zeros_like(self.base_inv_freq) + 0 * trained[-1].double().sum()
        y = self._bounded(solver.integrate(self._field(), start, t, num_steps, self.t_max))
        _require_usable(torch.isfinite(y), y, t)
        return y

    def _inv_freq(self, t: Tensor, learned: Tensor) -> Tensor:
        """Compute theta from theta(1), the drift and the learned part; exactly theta(1) at t = 1."""
        # One exponential of the summed logs keeps full float64 precision for large t.
        inv_freq = self.base_inv_freq * (learned - self.drift(t).to(learned.device)).exp()
        _require_usable(torch.isfinite(inv_freq) & (inv_freq > 0), learned, t)
        return inv_freq

    def _assess(self) -> SolverReport:
        self._require_finite()
        return solver.refine(self._field(), torch.zeros_like(self.base_inv_freq), self.t_max, self.tolerance)

    def _checked(self, t_grid: Grid) -> Tensor:
        t = as_grid(t_grid)
        if len(t) == 0 or not bool((t[1:] > t[:-1]).all()):
            raise ValueError(f"t={t.tolist()}: must be one or more ascending scale factors")
        if not (float(t[0]) >= 1 and float(t[-1]) <= self.t_max * (1 + 1e-12)):
            raise ValueError(
                f"t={float(t[0]):g}..{float(t[-1]):g}: scale factors must lie in [1, t_max={self.t_max:g}]"
            )
        return t


def _require_usable(good: Tensor, learned: Tensor, t: Tensor) -> None:
    if bool(good.all()):
        return
    row, column = (~good).nonzero()[0].tolist()
    at, value = float(t[row]), float(learned.detach()[row, column])
    message = f"the CLEX field breaks down at t={at:.3g}: it moves log theta[{column}] by {value:.3g}"
    raise UnstableField(message, at, value, "scaling.lr_scale or scaling.t_max")


def _check_arguments(inv_freq: Tensor, t_max: float, param_factor: float, act: str, tolerance: float) -> None:
    if inv_freq.ndim != 1 or len(inv_freq) == 0:
        raise ValueError(f"inv_freq of shape {tuple(inv_freq.shape)}: expected one frequency per rotated pair")
    unusable = (~(torch.isfinite(inv_freq) & (inv_freq > 0))).nonzero().flatten().tolist()
    if unusable:
        j = unusable[0]
        raise ValueError(
            f"inv_freq[{j}]={float(inv_freq[j]):g}, {len(unusable)} of {len(inv_freq)} like it: "
            "CLEX needs finite, positive frequencies"
        )
    if not t_max >= 1 or not math.isfinite(t_max):
        raise ValueError(f"t_max={t_max}: a scale factor must be at least 1")
    if not param_factor > 0:
        raise ValueError(f"param_factor={param_factor}: must be greater than 0")
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act}: one of {', '.join(ACTIVATIONS)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: must be greater than 0")
