"""CLEX against official outputs, a plain float64 solve in t, and finite differences; its guards and errors."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchdiffeq import odeint

from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.solver import MIN_STEPS, UnstableField


def rope(num_pairs: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def llama3_like(num_pairs: int) -> torch.Tensor:
    """Return frequencies that no base produces: slow ones divided by 8, a smooth band between."""
    blend = torch.linspace(0, 1, num_pairs, dtype=torch.float64) ** 2
    return rope(num_pairs, 500000.0) * (1 - blend + blend / 8)


def trained(clex: Clex, scale: float = 0.02, seed: int = 0) -> Clex:
    """Move the weights away from zero, as training would."""
    with torch.no_grad():
        clex.down.normal_(0, scale, generator=torch.Generator().manual_seed(seed))
    clex.refine()
    return clex


def golden_clex(goldens: Path, prefix: str, base: float, tolerance: float = 1e-6) -> Clex:
    """Build the field of an official checkpoint of head dim 128 (`prefix` such as hd128.tanh.pf1)."""
    tensors = load_file(goldens / "clex_ode.safetensors")
    up, down = tensors[f"{prefix}.ode_up_proj"], tensors[f"{prefix}.ode_down_proj"]
    factor = up.shape[1] / (2 * up.shape[0])
    return filled(Clex(rope(len(up), base), 16.0, factor, "tanh", True, tolerance), up, down)


def small_golden_clex(goldens: Path, tolerance: float = 1e-6) -> Clex:
    tensors = load_file(goldens / "clex_llama.weights.safetensors")
    key = "model.clex_layer.proj_func."
    clex = Clex(rope(16), 16.0, 1.0, "tanh", True, tolerance)
    return filled(clex, tensors[key + "ode_up_proj"], tensors[key + "ode_down_proj"])


def filled(clex: Clex, up: torch.Tensor, down: torch.Tensor) -> Clex:
    clex.load_state_dict({"up": up, "down": down}, strict=False)
    clex.refine()
    return clex


def plain_solve_in_t(clex: Clex, t: float) -> torch.Tensor:
    """Solve for log theta(t) by dopri8 in t, with the paper's equation: slow, and independent of the package."""
    num_pairs = len(clex.base_inv_freq)
    j = torch.arange(num_pairs, dtype=torch.float64)
    log_base, exponent = clex.base_inv_freq.log(), 2 * j / (2 * num_pairs - 2)
    up, down = clex.up.detach().double(), clex.down.detach().double()
    act = torch.nn.functional.silu if clex.act == "silu" else torch.tanh
    read_base = -j / num_pairs * math.log(10000.0) if clex.official_ntk_base else log_base

    def dz_dt(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        read = read_base - exponent * torch.log(2 * s - 1)
        return act((z + read) @ up) @ down - exponent * 2 / (2 * s - 1)

    points = torch.tensor([1.0, t], dtype=torch.float64)
    # End a step at t, because dense output is less accurate than the steps of the solver.
    options = {"step_t": points[1:]}
    return odeint(dz_dt, log_base, points, method="dopri8", rtol=1e-12, atol=1e-12, options=options)[-1]


@pytest.mark.parametrize("base", [rope(64), rope(64, 1e6), rope(16), llama3_like(64), rope(2)])
@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("official", [False, True])
def test_an_untrained_field_is_ntk_scaling(base: torch.Tensor, act: str, official: bool) -> None:
    clex = Clex(base, 16.0, act=act, official_ntk_base=official)
    table, expected = clex.table(scale_grid(16, 0.25)), ntk_table(base, scale_grid(16, 0.25))
    assert (table.inv_freq.log() - expected.inv_freq.log()).abs().max() < 1e-9
    assert (clex.inv_freq(7.3).log() - ntk_table(base, [1.0, 7.3]).inv_freq[1].log()).abs().max() < 1e-9


def test_t_1_gives_the_initial_frequencies_bitwise() -> None:
    clex = trained(Clex(llama3_like(32), 16.0))
    assert torch.equal(clex.inv_freq(1.0).detach(), llama3_like(32))
    assert torch.equal(clex.table(scale_grid(16)).at(1).inv_freq, llama3_like(32))


def test_continuous_t_agrees_with_the_exact_solution_of_the_goldens(goldens: Path) -> None:
    ode, clex = load_file(goldens / "clex_ode.safetensors"), small_golden_clex(goldens)
    for t, truth in zip(ode["cont.t"].tolist(), ode["tanh.cont.truth_logfreq"], strict=True):
        assert (clex.inv_freq(t).log() - truth).abs().max() < 3e-6, t


def test_the_table_agrees_with_the_exact_solution_of_the_goldens(goldens: Path) -> None:
    ode, table = load_file(goldens / "clex_ode.safetensors"), small_golden_clex(goldens).table(scale_grid(16))
    assert (table.inv_freq.log() - ode["tanh.int.truth_logfreq"]).abs().max() < 3e-6
    for kind in ("f32", "f64"):
        official = ode[f"tanh.inv_freq_1_16.{kind}"].double()
        assert ((table.inv_freq - official).abs() / official).max() < 6e-5


def test_a_tight_tolerance_reaches_the_exact_solution_to_1e_9(goldens: Path) -> None:
    ode, clex = load_file(goldens / "clex_ode.safetensors"), small_golden_clex(goldens, tolerance=1e-10)
    log_theta = clex.table(scale_grid(16)).inv_freq.log()
    assert (log_theta - ode["tanh.int.truth_logfreq"]).abs().max() < 1e-9


@pytest.mark.parametrize("prefix", ["hd128.tanh.pf1", "hd128.tanh.pf2"])
@pytest.mark.parametrize("base", [10000, 1000000])
def test_head_128_tables_agree_with_the_official_ones(goldens: Path, prefix: str, base: int) -> None:
    ode = load_file(goldens / "clex_ode.safetensors")
    table = golden_clex(goldens, prefix, base).table(scale_grid(16))
    exact = ode[f"{prefix}.base{base}.inv_freq_1_16.f64"]
    assert (table.inv_freq.log() - exact.log()).abs().max() < 3e-6
    official = ode[f"{prefix}.base{base}.inv_freq_1_16.f32"].double()
    assert ((table.inv_freq - official).abs() / official).max() < 6e-5


def test_the_official_input_base_matters_away_from_10000(goldens: Path) -> None:
    quirk = golden_clex(goldens, "hd128.tanh.pf1", 1e6)
    plain = Clex(rope(64, 1e6), 16.0, act="tanh")
    plain.load_state_dict(quirk.state_dict())
    moved = (plain.table(scale_grid(16)).inv_freq.log() - quirk.table(scale_grid(16)).inv_freq.log()).abs().max()
    assert 0.005 < moved < 0.5


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("official", [False, True])
def test_the_solve_agrees_with_the_papers_equation_in_t(act: str, official: bool) -> None:
    clex = trained(Clex(llama3_like(16), 8.0, 2.0, act, official), scale=0.03)
    for t in (1.2, 3.7, 8.0):
        assert (clex.inv_freq(t).log() - plain_solve_in_t(clex, t)).abs().max() < 2e-6


def finite_differences(loss: Callable[[], torch.Tensor], weight: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.zeros_like(weight)
    for index in range(weight.numel()):
        original = weight.view(-1)[index].item()
        values = []
        for sign in (1, -1):
            weight.view(-1)[index] = original + sign * step
            values.append(float(loss()))
        weight.view(-1)[index] = original
        gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_gradients_equal_float64_finite_differences(act: str) -> None:
    clex = trained(Clex(rope(4), 16.0, act=act, tolerance=1e-3), scale=0.1).double()
    weight = torch.linspace(-1, 2, 4, dtype=torch.float64)
    (clex.inv_freq(9.4).log() * weight).sum().backward()
    with torch.no_grad():
        for parameter in (clex.up, clex.down):
            expected = finite_differences(lambda: (clex.inv_freq(9.4).log() * weight).sum(), parameter.data)
            assert (parameter.grad - expected).abs().max() < 1e-7 * expected.abs().max()


def test_float32_parameters_get_the_float64_gradient_rounded_once() -> None:
    single = trained(Clex(rope(16), 16.0))
    double = trained(Clex(rope(16), 16.0)).double()
    for clex in (single, double):
        clex.inv_freq(11.0).sum().backward()
    assert single.up.dtype == torch.float32
    assert torch.equal(single.down.grad, double.down.grad.float())


def test_t_1_keeps_the_graph_with_a_gradient_of_zero() -> None:
    clex = trained(Clex(rope(8), 4.0))
    clex.inv_freq(1.0).sum().backward()
    assert float(clex.down.grad.abs().max()) == 0


def test_the_learned_part_is_differentiable_so_that_it_can_be_penalised() -> None:
    clex = trained(Clex(rope(8), 4.0))
    clex.learned([2.0, 4.0]).square().sum().backward()
    assert float(clex.up.grad.abs().max()) > 0


def test_table_and_single_solves_agree_within_the_tolerance() -> None:
    clex = trained(Clex(rope(32), 16.0))
    table = clex.table(scale_grid(16, 0.5))
    for t in (1.5, 8.0, 16.0):
        assert (table.at(t).inv_freq.log() - clex.inv_freq(t).log()).abs().max() < 2e-6


def test_a_table_of_changed_weights_meets_the_tolerance_without_affecting_the_run() -> None:
    clex = Clex(rope(32), 16.0)
    with torch.no_grad():
        clex.down.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    assert clex.num_steps == MIN_STEPS
    table = clex.table(scale_grid(16))
    assert clex.num_steps == MIN_STEPS
    clex.refine()
    assert clex.num_steps > MIN_STEPS
    assert (table.inv_freq[-1].log() - clex.inv_freq(16).log()).abs().max() < 2e-6


def test_the_table_records_the_hash_of_its_weights() -> None:
    clex = trained(Clex(rope(8), 4.0))
    first = clex.table(scale_grid(4))
    assert first.method == "clex"
    assert first.digest == clex.digest()
    with torch.no_grad():
        clex.down[0, 0] += 1e-6
    assert clex.digest() != first.digest


def test_a_state_dict_reproduces_the_solve_bitwise() -> None:
    clex, other = trained(Clex(llama3_like(16), 16.0, seed=1)), Clex(rope(16), 16.0, seed=2)
    other.load_state_dict(clex.state_dict())
    assert other.num_steps == clex.num_steps
    assert torch.equal(other.inv_freq(13.7), clex.inv_freq(13.7))


def test_initial_weights_are_uniform_in_their_bounds_and_depend_on_the_seed() -> None:
    clex = Clex(rope(64), 16.0, param_factor=2.0, seed=5)
    assert clex.up.shape == (64, 256)
    assert clex.down.shape == (256, 64)
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < float(clex.up.detach().abs().max()) <= bound
    assert float(clex.up.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(clex.up, Clex(rope(64), 16.0, param_factor=2.0, seed=5).up)
    assert not torch.equal(clex.up, Clex(rope(64), 16.0, param_factor=2.0, seed=6).up)


def test_a_single_rotated_pair_is_trained_without_drift() -> None:
    clex = Clex(torch.tensor([0.5]), 8.0)
    assert clex.inv_freq(8.0).item() == 0.5
    trained(clex, scale=0.1)
    assert abs(clex.inv_freq(8.0).item() - 0.5) > 1e-3


def test_the_residual_is_the_distance_from_ntk_and_zero_untrained() -> None:
    clex, t = Clex(rope(16), 8.0), scale_grid(8)
    assert float(clex.residual(t).max()) == 0
    trained(clex)
    distance = (clex.table(t).inv_freq.log() - ntk_table(rope(16), t).inv_freq.log()).abs().amax(dim=1)
    torch.testing.assert_close(clex.residual(t), distance, rtol=0, atol=2e-6)


def test_the_guard_accepts_a_small_residual_and_names_the_t_of_a_large_one() -> None:
    clex = trained(Clex(rope(16), 8.0))
    largest = float(clex.residual(scale_grid(8)).max())
    assert clex.check_residual(2 * largest) == pytest.approx(largest, rel=0.05)
    with pytest.raises(
        UnstableField, match=r"moved log theta by \S+ at t=\S+, which exceeds scaling\.max_residual="
    ) as caught:
        clex.check_residual(largest / 2)
    assert 1 < caught.value.t < 8
    assert largest / 2 < caught.value.value <= largest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_before_any_solve(value: float) -> None:
    clex = Clex(rope(8), 4.0)
    with torch.no_grad():
        clex.down[3, 5] = value
    for use in (lambda: clex.inv_freq(2.0), clex.refine, lambda: clex.table([1.0, 2.0]), lambda: clex.residual([2.0])):
        with pytest.raises(UnstableField, match=r"CLEX weight down\[3, 5\]=(nan|inf): not finite"):
            use()


def test_a_field_that_drives_frequencies_out_of_range_is_refused_with_its_t() -> None:
    clex = Clex(rope(8), 64.0)
    with torch.no_grad():
        clex.down.fill_(1.0)
    with pytest.raises(UnstableField, match=r"at t=|from t=") as caught:
        clex.inv_freq(64.0)
    assert caught.value.t == 64.0


def test_the_guard_stops_a_tenfold_learning_rate_before_non_finite_values() -> None:
    clex = Clex(rope(16), 16.0)
    optimizer = torch.optim.AdamW(clex.parameters(), lr=5e-3)

    def train() -> None:
        for step in range(500):
            optimizer.zero_grad()
            (-clex.inv_freq(1 + step % 16).log().sum()).backward()
            optimizer.step()
            clex.refine()
            clex.check_residual(4.0)

    with pytest.raises(UnstableField):
        train()
    assert all(torch.isfinite(p).all() for p in clex.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_max": 0.5}, "t_max=0.5"),
        ({"t_max": float("nan")}, "t_max=nan"),
        ({"param_factor": 0.0}, "param_factor=0.0"),
        ({"act": "relu"}, "act=relu: one of silu, tanh"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"inv_freq": torch.zeros(4)}, "finite, positive frequencies"),
        ({"inv_freq": torch.ones(0)}, r"shape \(0,\)"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"inv_freq": rope(4), "t_max": 4.0}
    with pytest.raises(ValueError, match=message):
        Clex(**{**arguments, **change})


@pytest.mark.parametrize("t", [0.99, 4.1, float("nan")])
def test_a_scale_factor_outside_the_range_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match=r"scale factors must lie in \[1, t_max=4\]"):
        Clex(rope(4), 4.0).inv_freq(t)


def test_a_grid_that_does_not_ascend_is_refused() -> None:
    for t_grid in ([2.0, 1.0], [2.0, 2.0], []):
        with pytest.raises(ValueError, match="ascending"):
            Clex(rope(4), 4.0).residual(t_grid)
