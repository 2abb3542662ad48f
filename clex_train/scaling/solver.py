"""Classical RK4 (torchdiffeq) for the residual on a graded grid of u, with the number of steps chosen by step doubling.

    nodes uniform in s = 2 (sqrt(2t - 1) - 1),    u = log(2t - 1) = 2 log(1 + s/2)

A stiff field is equally stiff per unit of t; a smooth one has inputs that move per unit of u. s lies between the two.
Compared with nodes uniform in u it leaves half the error at t = 16 and a tenth or less at t = 64.
The error of N steps is |y_N - y_2N| * 16/15. Shapes: `P` pairs, `K` scale factors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from torchdiffeq import odeint

from clex_train.utils.errors import InputError

MIN_STEPS = 8
MAX_STEPS = 1024
# Factor on the step count that order 4 predicts, so that the next check passes without another round.
SAFETY = 1.05

Field = Callable[[Tensor, Tensor], Tensor]


class UnstableField(InputError):
    """The learned field is unusable: too stiff, not finite, or beyond its bound.

    Carries `t`, `value` and `what`, which leaves out the config keys to `lower`, for callers that know of another
    cause.
    """

    def __init__(self, what: str, t: float, value: float, lower: str) -> None:
        super().__init__(f"{what}; lower {lower}")
        self.what, self.t, self.value = what, t, value


@dataclass(frozen=True)
class SolverReport:
    """Result of `refine`: steps from 1 to t_max, their estimated error in log theta, and `t` at the largest error."""

    num_steps: int
    error: float
    t: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.num_steps} RK4 steps, error {self.error:.1e} in log theta at t={self.t:.3g}"


def integrate(
    field: Field, y0: Float64[Tensor, " P"], t_points: Float64[Tensor, " K"], num_steps: int, t_max: float
) -> Float64[Tensor, "K P"]:
    """Integrate y from y(1) = y0 to the ascending scale factors `t_points` >= 1.

    Steps are at most 1/num_steps of the way from t = 1 to `t_max`, and pass through every requested point.
    """
    wanted = s_of_t(torch.cat((torch.ones(1, dtype=torch.float64), t_points)))
    # t = 1 may be requested too; odeint requires strictly increasing times.
    grid = torch.unique_consecutive(wanted)
    if len(grid) == 1:
        return y0.expand(len(t_points), -1)
    nodes = _subdivide(grid, float(s_of_t(t_max)) / num_steps)
    solution: Tensor = odeint(
        field,
        y0,
        u_from_s(grid).to(y0.device),
        method="rk4",
        # Without it, odeint would take one RK4 step between requested points.
        options={"grid_constructor": lambda *_: u_from_s(nodes).to(y0.device)},
    )
    return solution[torch.searchsorted(grid, wanted[1:])]


def refine(
    field: Field, y0: Float64[Tensor, " P"], t_max: float, tolerance: float, max_steps: int = MAX_STEPS
) -> SolverReport:
    """Find about the fewest steps whose estimated error stays below `tolerance` everywhere in [1, t_max].

    Raises:
        UnstableField: `max_steps` do not suffice, or the solution is not finite (names t, steps and error).
    """
    if t_max <= 1:
        return SolverReport(MIN_STEPS, 0.0, 1.0, tolerance)
    num_steps = MIN_STEPS
    while True:
        errors, t_nodes = _doubling_errors(field, y0, t_max, num_steps)
        error = float(errors.max())
        if error <= tolerance:
            return SolverReport(num_steps, error, float(t_nodes[errors.argmax()]), tolerance)
        if num_steps >= max_steps:
            raise _too_stiff(errors, t_nodes, num_steps, tolerance)
        num_steps = _more_steps(num_steps, error, tolerance, max_steps)


def s_of_t(t: Tensor | float) -> Tensor:
    """Compute s(t), the coordinate in which steps are equally long."""
    # 2 (sqrt(2t - 1) - 1) without cancellation near t = 1.
    return 2 * torch.expm1(torch.log1p(2 * (torch.as_tensor(t, dtype=torch.float64) - 1)) / 2)


def u_from_s(s: Tensor) -> Tensor:
    """Compute u = log(2t - 1) from the coordinate s."""
    return 2 * torch.log1p(s / 2)


def _subdivide(grid: Tensor, longest: float) -> Tensor:
    """Place nodes at every member of `grid`, and between them at most `longest` apart."""
    gaps = grid.diff()
    # The slack keeps a gap of exactly n steps from becoming n + 1 by rounding.
    counts = torch.ceil(gaps / longest * (1 - 1e-12)).clamp(min=1).long()
    left = torch.repeat_interleave(grid[:-1], counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    fraction = (torch.arange(len(left)) - first) * torch.repeat_interleave(gaps / counts, counts)
    return torch.cat((left + fraction, grid[-1:]))


def _doubling_errors(field: Field, y0: Tensor, t_max: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return max_j |y_N - y_2N| * 16/15 at the coarse grid's nodes, infinite where y is not finite, and their t."""
    s = s_of_t(t_max) * torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    t_nodes = (1 + torch.exp(u_from_s(s))) / 2
    with torch.no_grad():
        coarse = integrate(field, y0, t_nodes, num_steps, t_max)
        fine = integrate(field, y0, t_nodes, 2 * num_steps, t_max)
    # Richardson: for order 4, doubling the steps divides the error by 16, so the difference is 15/16 of it.
    errors = (coarse - fine).abs().amax(dim=1) * (16 / 15)
    return errors.nan_to_num(nan=math.inf), t_nodes


def _more_steps(num_steps: int, error: float, tolerance: float, max_steps: int) -> int:
    """Return the steps that order 4 predicts, at most four times as many at once."""
    # Far from the limit the error does not follow order 4 yet, and the prediction overshoots.
    factor: float = min(4.0, SAFETY * (error / tolerance) ** 0.25)
    return min(max_steps, max(num_steps + 1, math.ceil(num_steps * factor)))


def _too_stiff(errors: Tensor, t_nodes: Tensor, num_steps: int, tolerance: float) -> UnstableField:
    first = int((errors > tolerance).nonzero()[0])
    t, error = float(t_nodes[first]), float(errors.max())
    return UnstableField(
        f"the CLEX field is too stiff from t={t:.3g} on: with {num_steps} steps the error in log theta is {error:.1e}, "
        f"above scaling.tolerance={tolerance:g}",
        t,
        error,
        "scaling.lr_scale or scaling.t_max",
    )
