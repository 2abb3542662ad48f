"""Classical RK4 (torchdiffeq) for the residual on a graded grid of u, its number of steps chosen by step doubling.

    nodes uniform in s = 2 (sqrt(2t - 1) - 1),    u = log(2t - 1) = 2 log(1 + s/2)

Where the field is stiff it is equally stiff per unit of t, where it is not its input moves per unit of u; s lies
between the two, and leaves a half (t = 16) to a tenth and less (t = 64) of the error of nodes uniform in u.
The error of N steps is |y_N - y_2N| * 16/15. Shapes: `P` pairs, `K` scale factors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from torchdiffeq import odeint

MIN_STEPS = 8
MAX_STEPS = 1024
# A factor on the step count above what order 4 predicts, so that the next check passes without another round.
SAFETY = 1.05

Field = Callable[[Tensor, Tensor], Tensor]


class UnstableField(ValueError):
    """The learned field cannot be used: too stiff, not finite, or beyond its bound.

    Carries `t` and `value`, and `what` is wrong without the keys to `lower`, for who knows of another cause.
    """

    def __init__(self, what: str, t: float, value: float, lower: str) -> None:
        super().__init__(f"{what}; lower {lower}")
        self.what, self.t, self.value = what, t, value


@dataclass(frozen=True)
class SolverReport:
    """What `refine` found: steps from 1 to t_max, their estimated error in log theta, the `t` where it is largest."""

    num_steps: int
    error: float
    t: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.num_steps} RK4 steps, error {self.error:.1e} in log theta at t={self.t:.3g}"


def integrate(
    field: Field, y0: Float64[Tensor, " P"], t_points: Float64[Tensor, " K"], num_steps: int, t_max: float
) -> Float64[Tensor, "K P"]:
    """y at the ascending scale factors `t_points` >= 1, from y(1) = y0.

    Steps are no longer than 1/num_steps of the way from t = 1 to `t_max`, and pass through every wanted point.
    """
    wanted = s_of_t(torch.cat((torch.ones(1, dtype=torch.float64), t_points)))
    grid = torch.unique_consecutive(wanted)
    if len(grid) == 1:
        return y0.expand(len(t_points), -1)
    nodes = _subdivide(grid, float(s_of_t(t_max)) / num_steps)
    solution = odeint(
        field,
        y0,
        u_from_s(grid).to(y0.device),
        method="rk4",
        options={"grid_constructor": lambda *_: u_from_s(nodes).to(y0.device)},
    )
    return solution[torch.searchsorted(grid, wanted[1:])]


def refine(
    field: Field, y0: Float64[Tensor, " P"], t_max: float, tolerance: float, max_steps: int = MAX_STEPS
) -> SolverReport:
    """The fewest steps (about) whose estimated error stays below `tolerance` everywhere in [1, t_max].

    Raises `UnstableField` naming t, steps and error when `max_steps` do not suffice or the solution is not finite.
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
    """s(t), the coordinate in which steps are equally long."""
    return 2 * torch.expm1(torch.log1p(2 * (torch.as_tensor(t, dtype=torch.float64) - 1)) / 2)


def u_from_s(s: Tensor) -> Tensor:
    """u = log(2t - 1) of the coordinate s."""
    return 2 * torch.log1p(s / 2)


def _subdivide(grid: Tensor, longest: float) -> Tensor:
    """Nodes through every member of `grid`, none further apart than `longest`."""
    gaps = grid.diff()
    counts = torch.ceil(gaps / longest * (1 - 1e-12)).clamp(min=1).long()
    left = torch.repeat_interleave(grid[:-1], counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    fraction = (torch.arange(len(left)) - first) * torch.repeat_interleave(gaps / counts, counts)
    return torch.cat((left + fraction, grid[-1:]))


def _doubling_errors(field: Field, y0: Tensor, t_max: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """max_j |y_N - y_2N| * 16/15 at the nodes of the coarse grid, and their t; infinite where y is not finite."""
    s = s_of_t(t_max) * torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    t_nodes = (1 + torch.exp(u_from_s(s))) / 2
    with torch.no_grad():
        coarse = integrate(field, y0, t_nodes, num_steps, t_max)
        fine = integrate(field, y0, t_nodes, 2 * num_steps, t_max)
    errors = (coarse - fine).abs().amax(dim=1) * (16 / 15)
    return errors.nan_to_num(nan=math.inf), t_nodes


def _more_steps(num_steps: int, error: float, tolerance: float, max_steps: int) -> int:
    """Steps that order 4 predicts, at most four times as many at once: far from the limit the order is not yet seen."""
    factor = min(4.0, SAFETY * (error / tolerance) ** 0.25)
    return min(max_steps, max(num_steps + 1, math.ceil(num_steps * factor)))


def _too_stiff(errors: Tensor, t_nodes: Tensor, num_steps: int, tolerance: float) -> UnstableField:
    first = int((errors > tolerance).nonzero()[0])
    t, error = float(t_nodes[first]), float(errors.max())
    return UnstableField(
        f"the CLEX field is too stiff from t={t:.3g} on: {num_steps} steps leave an error of {error:.1e} in log theta, "
        f"above scaling.tolerance={tolerance:g}",
        t,
        error,
        "scaling.lr_scale or scaling.t_max",
    )
