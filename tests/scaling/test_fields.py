"""The log-time field: its equation, its start, its bound, its drifts, and how it learns."""

import math

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from clex_train.scaling.clex import Clex
from clex_train.scaling.fields import BOUND, CLOCK, DirectionClex, LogTimeClex
from clex_train.scaling.spectrum import ntk_exponents

BASE = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)


def trained(clex: LogTimeClex, size: float = 1.0, seed: int = 0) -> LogTimeClex:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in clex.named_parameters():
            if weight.requires_grad and name in ("down", "direction"):
                weight.normal_(std=size, generator=random)
    clex.refine()
    return clex


def reference(clex: LogTimeClex, t: float) -> np.ndarray:
    """Solve for y by torchdiffeq's dopri8, from the equation in the module's docstring."""
    up, down, bias, clock, a = (
        getattr(clex, name).detach().double() for name in ("up", "down", "bias", "clock", "direction")
    )

    def rhs(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        read = torch.tanh(v / BOUND) @ up + u / CLOCK * clock + bias
        return a + (read / (1 + torch.exp(-read))) @ down / len(bias)

    span = torch.tensor([0.0, math.log(2 * t - 1)], dtype=torch.float64)
    v = odeint(rhs, torch.zeros_like(a), span, method="dopri8", rtol=1e-12, atol=1e-12)[-1]
    return (BOUND * torch.tanh(v / BOUND)).numpy()


@pytest.mark.parametrize("t", [1.5, 4.0, 16.0])
def test_the_learned_part_is_the_solution_of_its_equation(t: float) -> None:
    clex = trained(LogTimeClex(BASE, 16.0, tolerance=1e-8))
    np.testing.assert_allclose(clex.learned([t])[0].detach().numpy(), reference(clex, t), atol=2e-8)
    expected = BASE.log().numpy() - math.log(2 * t - 1) * ntk_exponents(8).numpy() + reference(clex, t)
    np.testing.assert_allclose(clex.inv_freq(t).detach().log().numpy(), expected, atol=3e-8)


@pytest.mark.parametrize("kind", [LogTimeClex, DirectionClex])
def test_an_untrained_field_is_the_drift_of_the_paper_s(kind: type[LogTimeClex]) -> None:
    grid = [1.0, 2.0, 16.0]
    assert torch.equal(kind(BASE, 16.0).table(grid).inv_freq, Clex(BASE, 16.0).table(grid).inv_freq)


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_no_weights_move_a_frequency_beyond_the_bound(size: float) -> None:
    clex = LogTimeClex(BASE, 32.0, tolerance=1e-2)
    with torch.no_grad():
        clex.direction.fill_(size)
    assert clex.check_residual(BOUND) <= BOUND, "the default guard never fires"
    assert clex.residual([2.0]).item() > 0.5 if size == 1.0 else True


def test_a_learned_direction_moves_every_pair_with_the_log_of_t() -> None:
    clex = DirectionClex(BASE, 16.0)
    with torch.no_grad():
        clex.direction.copy_(torch.linspace(-0.5, 0.5, 8))
    for t in (2.0, 16.0):
        expected = BOUND * torch.tanh(torch.linspace(-0.5, 0.5, 8).double() * math.log(2 * t - 1) / BOUND)
        torch.testing.assert_close(clex.learned([t])[0], expected, atol=1e-6, rtol=0)
    assert [name for name, weight in clex.named_parameters() if weight.requires_grad] == ["direction"]


@pytest.mark.parametrize("kind", [LogTimeClex, DirectionClex])
@pytest.mark.parametrize("t", [1.0, 7.0])
def test_the_gradient_is_that_of_finite_differences(kind: type[LogTimeClex], t: float) -> None:
    clex = trained(kind(BASE, 16.0, tolerance=1e-3), 0.3).double()
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (clex.inv_freq(t).log() * weights).sum()

    loss().backward()
    for name, weight in clex.named_parameters():
        if not weight.requires_grad:
            assert weight.grad is None
            continue
        index = (0,) * weight.ndim
        with torch.no_grad():
            before = weight[index].item()
            weight[index] = before + 1e-5
            above = loss().item()
            weight[index] = before - 1e-5
            below = loss().item()
            weight[index] = before
        found = 0.0 if weight.grad is None else weight.grad[index].item()
        assert found == pytest.approx((above - below) / 2e-5, abs=1e-8, rel=1e-6), name


def test_a_step_of_the_model_s_rate_moves_the_field_about_equally_at_any_width() -> None:
    moved = []
    for factor in (0.5, 4.0):
        clex = LogTimeClex(BASE, 16.0, factor)
        optimizer = torch.optim.AdamW(clex.parameters(), lr=5e-4, weight_decay=0.0)
        clex.inv_freq(16.0).log().sum().backward()
        optimizer.step()
        moved.append(clex.check_residual(BOUND))
    assert moved[0] == pytest.approx(moved[1], rel=0.5)
    # 300 such steps move a frequency by less than a factor of e, where the paper's field moves by that in a few.
    assert 300 * max(moved) < 2
    paper = Clex(BASE, 16.0)
    paper.inv_freq(16.0).log().sum().backward()
    torch.optim.AdamW(paper.parameters(), lr=5e-4, weight_decay=0.0).step()
    assert paper.check_residual(100) > 20 * max(moved)


def test_yarn_s_drift_interpolates_by_share_and_tempers() -> None:
    shares = torch.linspace(0, 1, 8, dtype=torch.float64)
    clex = LogTimeClex(BASE, 16.0, shares=shares)
    table = clex.table([1.0, 4.0, 16.0])
    for row, t in enumerate((1.0, 4.0, 16.0)):
        torch.testing.assert_close(table.inv_freq[row], BASE * (1 - shares + shares / t), rtol=1e-12, atol=0)
        assert table.at(t).attention_factor == pytest.approx(0.1 * math.log(t) + 1)
    still = LogTimeClex(BASE, 16.0, shares=torch.zeros(8)).table([1.0, 16.0])
    assert torch.equal(still.inv_freq[0], still.inv_freq[1])
    assert still.attention_factors is None


def test_the_digest_tells_fields_and_drifts_apart() -> None:
    made = [
        Clex(BASE, 16.0),
        LogTimeClex(BASE, 16.0),
        DirectionClex(BASE, 16.0),
        LogTimeClex(BASE, 16.0, shares=torch.zeros(8)),
        LogTimeClex(BASE, 16.0, shares=torch.ones(8)),
    ]
    assert len({clex.digest() for clex in made}) == len(made)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"official_ntk_base": True}, "official_ntk_base"),
        ({"shares": torch.ones(3)}, "shares"),
        ({"t_max": 0}, "t_max"),
    ],
)
def test_arguments_out_of_range_are_named(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LogTimeClex(**{"inv_freq": BASE, "t_max": 16.0} | change)
