"""The ODE solver on problems with exact solutions: order, requested points, tolerance, stiffness."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from clex_train.scaling.solver import MAX_STEPS, MIN_STEPS, UnstableField, integrate, refine
from clex_train.scaling.vector_field import VectorField, network_input_start

ZERO = torch.zeros(1, dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def growth(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Evaluate dy/du = cos(3u) y, whose solution from y(0) = 1 is exp(sin(3u) / 3)."""
    return torch.cos(3 * u) * y


def growth_exact(t: torch.Tensor) -> torch.Tensor:
    return torch.exp(torch.sin(3 * torch.log(2 * t - 1)) / 3)[:, None]


def decay(rate: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Build dy/dt = -rate (y - 1), written in u: y(t) = 1 - exp(-rate (t - 1)), as stiff as `rate`."""
    return lambda u, y: -rate * torch.exp(u) / 2 * (y - 1)


def clex_field(scale: float) -> VectorField:
    generator = torch.Generator().manual_seed(0)
    up = (2 * torch.rand(16, 32, generator=generator, dtype=torch.float64) - 1) / math.sqrt(32)
    down = scale * torch.randn(32, 16, generator=generator, dtype=torch.float64)
    log_base = -torch.arange(16, dtype=torch.float64) / 16 * math.log(10000)
    return VectorField.build(up, down, network_input_start(log_base, False), "silu")


def grid(*t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def observed_orders(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_the_observed_order_of_convergence_is_4() -> None:
    t = grid(16.0)
    errors = [float((integrate(growth, ONE, t, n, 16.0) - growth_exact(t)).abs().max()) for n in (32, 64, 128, 256)]
    assert all(3.8 < order < 4.2 for order in observed_orders(errors)), errors


def test_the_observed_order_is_4_on_the_clex_field_itself() -> None:
    field, zero, t = clex_field(0.02), torch.zeros(16, dtype=torch.float64), grid(16.0)
    truth = integrate(field, zero, t, 2048, 16.0)
    errors = [float((integrate(field, zero, t, n, 16.0) - truth).abs().max()) for n in (32, 64, 128)]
    assert all(3.8 < order < 4.2 for order in observed_orders(errors)), errors


def test_requested_points_are_step_ends_and_not_interpolated() -> None:
    crowded = torch.linspace(1.001, 16, 400, dtype=torch.float64)
    error = (integrate(growth, ONE, crowded, 64, 16.0) - growth_exact(crowded)).abs().max()
    alone = (integrate(growth, ONE, grid(16.0), 64, 16.0) - growth_exact(grid(16.0))).abs().max()
    assert error < 1e-5
    assert error < 20 * alone + 1e-6


def test_one_solve_agrees_with_a_solve_per_point() -> None:
    field, zero, t = clex_field(0.02), torch.zeros(16, dtype=torch.float64), grid(1.0, 1.5, 3.0, 16.0)
    together = integrate(field, zero, t, 128, 16.0)
    alone = torch.cat([integrate(field, zero, t[k : k + 1], 128, 16.0) for k in range(4)])
    assert (together - alone).abs().max() < 1e-8


def test_t_1_is_the_initial_value_for_every_request() -> None:
    assert torch.equal(integrate(growth, ONE, grid(1.0), 8, 16.0), torch.ones(1, 1, dtype=torch.float64))
    assert float(integrate(growth, ONE, grid(1.0, 2.0), 8, 16.0)[0]) == 1.0


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_refined_steps_meet_the_tolerance_and_do_not_underestimate_the_error(tolerance: float) -> None:
    report = refine(growth, ONE, 16.0, tolerance)
    t = torch.linspace(1.01, 16, 57, dtype=torch.float64)
    true_error = float((integrate(growth, ONE, t, report.num_steps, 16.0) - growth_exact(t)).abs().max())
    assert report.error <= tolerance
    assert true_error < 2 * tolerance
    at = grid(report.t)
    error_there = float((integrate(growth, ONE, at, report.num_steps, 16.0) - growth_exact(at)).abs())
    assert error_there == pytest.approx(report.error, rel=0.5)


def test_steps_follow_from_the_tolerance_with_order_4_and_not_more_than_needed() -> None:
    coarse, fine = (refine(growth, ONE, 16.0, tolerance).num_steps for tolerance in (1e-5, 1e-9))
    assert fine / coarse == pytest.approx(10, rel=0.35)


def test_steps_follow_from_the_field() -> None:
    zero = torch.zeros(16, dtype=torch.float64)
    mild, strong = (refine(clex_field(scale), zero, 16.0, 1e-6).num_steps for scale in (1e-4, 0.02))
    assert MIN_STEPS <= mild < strong < MAX_STEPS


def test_a_stiff_field_gets_more_steps_before_it_is_refused() -> None:
    report = refine(decay(20.0), ZERO, 16.0, 1e-6)
    t = grid(1.05, 1.3, 2.0, 16.0)
    exact = 1 - torch.exp(-20 * (t - 1))[:, None]
    assert report.num_steps > 100
    assert (integrate(decay(20.0), ZERO, t, report.num_steps, 16.0) - exact).abs().max() < 2e-6


def test_a_field_too_stiff_for_the_grid_is_refused_with_t_steps_and_error() -> None:
    with pytest.raises(
        UnstableField, match=r"too stiff from t=\S+ on: with 64 steps the error in log theta is \S+"
    ) as caught:
        refine(decay(1e4), ZERO, 16.0, 1e-6, max_steps=64)
    assert 1 < caught.value.t <= 16
    assert caught.value.value > 1e-6
    assert "\n" not in str(caught.value)


def test_a_diverging_solution_is_reported_without_an_endless_search() -> None:
    with pytest.raises(UnstableField, match="too stiff"):
        refine(lambda u, y: y**2 * 1e3, ONE, 16.0, 1e-6, max_steps=64)


def test_t_max_1_needs_no_grid() -> None:
    assert refine(growth, ONE, 1.0, 1e-6).num_steps == MIN_STEPS


def test_the_solve_passes_gradcheck() -> None:
    up = 0.3 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    down = 0.2 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start = network_input_start(torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64), False)

    def solve(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        field = VectorField.build(up, down, start, "silu")
        return integrate(field, torch.zeros(3, dtype=torch.float64), grid(1.3, 4.0), 8, 4.0)

    assert torch.autograd.gradcheck(solve, (up.requires_grad_(), down.requires_grad_()))
