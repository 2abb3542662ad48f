"""The vector field dy/du against samples of the official code and the equation in t."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clex_train.scaling.vector_field import VectorField, network_input_start


def rope(num_pairs: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def weights(num_pairs: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_pairs)
    up = torch.randn(num_pairs, hidden, generator=generator, dtype=torch.float64) / math.sqrt(hidden)
    return up, 0.1 * torch.randn(hidden, num_pairs, generator=generator, dtype=torch.float64)


def drift(num_pairs: int) -> torch.Tensor:
    """Compute 2j / (d - 2)."""
    return 2 * torch.arange(num_pairs, dtype=torch.float64) / (2 * num_pairs - 2)


def test_the_field_equals_samples_of_the_official_code(goldens: Path) -> None:
    ode, model = load_file(goldens / "clex_ode.safetensors"), load_file(goldens / "clex_llama.weights.safetensors")
    up = model["model.clex_layer.proj_func.ode_up_proj"]
    down = model["model.clex_layer.proj_func.ode_down_proj"]
    start = network_input_start(rope(16).log(), official_ntk_base=True)
    field = VectorField.build(up, down, start, "tanh")
    checked = 0
    for t, z, expected in zip(ode["field_t"], ode["field_x"], ode["tanh.field_out.f64"], strict=True):
        if t < 1:
            continue
        u = torch.log(2 * t.double() - 1)
        y = z.double() - (rope(16).log() - drift(16) * u)
        dz_dt = field(u, y) * 2 / (2 * t.double() - 1) - drift(16) * 2 / (2 * t.double() - 1)
        assert (dz_dt - expected).abs().max() < 1e-6
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_the_field_equals_the_equation_written_out(act: str, official: bool, base: float) -> None:
    up, down = weights(8, 24)
    log_base, u = rope(8, base).log(), torch.tensor(1.3, dtype=torch.float64)
    y = torch.linspace(-1, 1, 8, dtype=torch.float64)
    log_ntk = log_base - drift(8) * u
    read = rope(8).log() - drift(8) * u if official else log_ntk
    act_function = torch.nn.functional.silu if act == "silu" else torch.tanh
    expected = (act_function((y + log_ntk + read) @ up) @ down) * u.exp() / 2
    field = VectorField.build(up, down, network_input_start(log_base, official), act)
    torch.testing.assert_close(field(u, y), expected, rtol=1e-12, atol=1e-14)


def test_the_official_input_equals_the_plain_one_only_at_base_10000() -> None:
    for base, equal in ((1e4, True), (1e6, False)):
        plain, official = (network_input_start(rope(8, base).log(), quirk) for quirk in (False, True))
        assert torch.allclose(plain, official) is equal


def test_float32_weights_are_used_in_float64() -> None:
    up, down = (w.float() for w in weights(8, 16))
    field = VectorField.build(up, down, network_input_start(rope(8).log(), False), "silu")
    out = field(torch.tensor(0.5, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    exact = VectorField.build(up.double(), down.double(), network_input_start(rope(8).log(), False), "silu")
    assert torch.equal(out, exact(torch.tensor(0.5, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)))
