"""The optimizer of the ODE: gradient, guard, state and prefetching."""

import pytest
import torch

from clex_train.config.scaling import ScalingConfig
from clex_train.data.position_sampling import draw_t
from clex_train.scaling.clex import Clex
from clex_train.scaling.solver import UnstableField
from clex_train.training.ode_optimizer import OdeOptimizer

BASE = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)


def make(**scaling) -> OdeOptimizer:
    config = ScalingConfig(t_max=8, lr_scale=1.0, **scaling)
    return OdeOptimizer(Clex(BASE, t_max=8, seed=3), config, seed=5)


def step(ode: OdeOptimizer, number: int, lr: float = 1e-3) -> float:
    """Take a step whose loss is the sum of squared frequencies over two micro batches."""
    spectrum = ode.begin(number)
    for _ in range(2):
        (spectrum.inv_freq.square().sum() / 2).backward()
    return ode.finish(lr)


def test_the_gradient_equals_that_of_backpropagating_the_loss_directly():
    ode = make(clip=1e9)
    with torch.no_grad():
        ode.clex.down.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    ode.check(0)
    t = draw_t(5, 0, 8)
    expected = torch.autograd.grad(ode.clex.inv_freq(t).square().sum(), list(ode.clex.parameters()))
    before = [p.detach().clone() for p in ode.clex.parameters()]
    norm = step(ode, 0, lr=0.0)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()), rel=1e-6)
    for parameter, gradient in zip(ode.clex.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(ode.clex.parameters(), before, strict=True)), "lr 0 moves nothing"


def test_the_clip_bounds_the_gradient_that_the_optimizer_sees():
    ode = make(clip=1e-3)
    with torch.no_grad():
        ode.clex.down.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    assert step(ode, 0) > 1e-3
    clipped = torch.cat([p.grad.flatten() for p in ode.clex.parameters()]).norm()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_steps_lower_the_loss():
    ode = make(clip=1.0)
    t = torch.linspace(1, 8, 8, dtype=torch.float64)
    before = float(ode.clex.learned(t).sum().detach())
    for number in range(10):
        step(ode, number, lr=1e-4)
    assert float(ode.clex.learned(t).sum().detach()) < before, "smaller frequencies lower the sum of squares"


def test_a_frozen_field_stays_at_ntk():
    ode = OdeOptimizer(Clex(BASE, t_max=8), ScalingConfig(t_max=8, lr_scale=0.0), seed=0)
    spectrum = ode.begin(0)
    assert not spectrum.inv_freq.requires_grad
    assert ode.finish(1.0) == 0.0
    alpha = 2 * spectrum.t - 1
    exponents = torch.arange(8, dtype=torch.float64) * 2 / 14
    torch.testing.assert_close(spectrum.inv_freq, BASE * alpha**-exponents, rtol=1e-12, atol=0)


def test_a_state_restored_in_the_middle_continues_bitwise():
    whole, first = make(), make()
    for number in range(6):
        step(whole, number)
    for number in range(3):
        step(first, number)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    for number in range(3, 6):
        step(resumed, number)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.clex.state_dict().values(), resumed.clex.state_dict().values(), strict=True)
    )


def test_a_field_beyond_its_bound_stops_the_run_naming_t():
    ode = make(max_residual=0.05)
    with torch.no_grad():
        ode.clex.down.fill_(0.05)
    with pytest.raises(UnstableField, match=r"t=.*scaling\.max_residual=0\.05"):
        ode.begin(0)


def test_a_non_finite_field_stops_the_run_before_it_reaches_the_model():
    ode = make()
    with torch.no_grad():
        ode.clex.down[0, 0] = float("nan")
    with pytest.raises(UnstableField, match="not finite"):
        ode.begin(1)


def test_a_growing_field_gives_a_warning_before_the_guard_stops_it(caplog):
    ode = make(max_residual=1.0)
    with torch.no_grad():
        ode.clex.down.fill_(0.01)
    residual = float(ode.clex.residual([8.0]))
    ode.config.max_residual = residual * 1.5
    ode.check(100)
    assert "scaling.max_residual" in caplog.text


def bits(ode: OdeOptimizer) -> list[torch.Tensor]:
    return list(ode.clex.state_dict().values())


def trained_ode(**scaling) -> OdeOptimizer:
    ode = make(**scaling)
    with torch.no_grad():
        ode.clex.down.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    return ode


def test_prefetching_changes_no_bit_even_across_a_grid_check():
    plain, ahead = trained_ode(check_every=3), trained_ode(check_every=3)
    for number in range(7):
        step(plain, number)
        step(ahead, number)
        ahead.prefetch(number + 1)
    assert all(torch.equal(a, b) for a, b in zip(bits(plain), bits(ahead), strict=True))


def test_a_prefetched_step_is_solved_once(monkeypatch):
    ode, solved = trained_ode(), []
    inv_freq = ode.clex.inv_freq
    monkeypatch.setattr(ode.clex, "inv_freq", lambda t: solved.append(t) or inv_freq(t))
    ode.prefetch(1)
    spectrum = ode.begin(1)
    assert solved == [spectrum.t]


def test_a_prefetch_of_another_step_is_discarded():
    ode, expected = trained_ode(), trained_ode().begin(2)
    ode.prefetch(1)
    assert torch.equal(ode.begin(2).inv_freq, expected.inv_freq)


def test_loading_a_state_discards_a_prefetch():
    ode, other = trained_ode(), make()
    ode.prefetch(1)
    ode.load_state_dict(other.state_dict())
    assert torch.equal(ode.begin(1).inv_freq, other.begin(1).inv_freq)


def test_a_failing_prefetched_solve_is_raised_in_its_step():
    ode = make()
    with torch.no_grad():
        ode.clex.down[0, 0] = float("nan")
    ode.prefetch(1)
    with pytest.raises(UnstableField, match="not finite"):
        ode.begin(1)


def test_a_given_gradient_is_used():
    taken, given = trained_ode(clip=1e9), trained_ode(clip=1e9)
    step(taken, 1)
    given.begin(1).inv_freq.square().sum().backward()
    given.finish(1e-3, given.gradient() / 3)
    for one, three in zip(given.clex.parameters(), taken.clex.parameters(), strict=True):
        torch.testing.assert_close(3 * one.grad, three.grad, rtol=1e-5, atol=1e-12)
