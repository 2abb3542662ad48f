"""cos and sin at any position, their gradient, and the rotations that they define."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from clex_train.scaling.spectrum import cos_sin, rotate


def rope(num_pairs: int = 64, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def exact(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compute in extended precision: the phase of position 10^9 keeps ten decimals."""
    phase = positions.numpy().astype(np.longdouble)[..., None] * inv_freq.numpy().astype(np.longdouble)
    return np.cos(phase), np.sin(phase)


def worst(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.abs(ours.numpy().astype(np.longdouble) - reference).max())


@pytest.mark.parametrize("last", [2**12, 2**20, 10**8])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_cos_and_sin_are_within_1e_6_up_to_a_hundred_million(last: int, base: float) -> None:
    positions = torch.cat((torch.arange(0, 512), torch.arange(last - 2048, last + 1)))[None]
    cos, sin = cos_sin(positions, rope(base=base))
    expected_cos, expected_sin = exact(positions, rope(base=base))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (1, len(positions[0]), 64)
    assert worst(cos, expected_cos) < 1e-6
    assert worst(sin, expected_sin) < 1e-6


def test_a_float32_phase_exceeds_that_bound_by_far() -> None:
    positions = torch.arange(2**20 - 2048, 2**20)[None]
    phase = positions.float()[..., None] * rope().float()
    assert worst(phase.cos(), exact(positions, rope())[0]) > 1e-2


def test_fractional_positions_are_as_exact_as_whole_ones() -> None:
    positions = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**20
    cos, sin = cos_sin(positions, rope())
    expected_cos, expected_sin = exact(positions, rope())
    assert max(worst(cos, expected_cos), worst(sin, expected_sin)) < 1e-6


def test_whole_positions_give_the_same_bits_as_int64_and_as_float64() -> None:
    positions = torch.arange(5000)[None]
    for ours, other in zip(cos_sin(positions, rope()), cos_sin(positions.double(), rope()), strict=True):
        assert torch.equal(ours, other)


@settings(max_examples=50)
@given(st.floats(-1e6, 1e6), st.floats(1e-8, 10.0))
def test_cos_and_sin_are_exact_for_any_position_and_frequency(position: float, theta: float) -> None:
    positions, inv_freq = torch.tensor([[position]], dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
    cos, sin = cos_sin(positions, inv_freq)
    assert abs(float(cos) - math.cos(position * theta)) < 1e-6
    assert abs(float(sin) - math.sin(position * theta)) < 1e-6


def test_the_gradient_in_log_theta_matches_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    positions = torch.rand(2, 300, generator=generator, dtype=torch.float64) * 65536
    weight_cos, weight_sin = torch.randn(2, 2, 300, 64, generator=generator).unbind(0)
    log_theta = rope().log().requires_grad_()

    cos, sin = cos_sin(positions, log_theta.exp())
    (ours,) = torch.autograd.grad((cos * weight_cos + sin * weight_sin).sum(), log_theta)
    phase = positions[..., None] * log_theta.exp()
    loss = (phase.cos() * weight_cos.double() + phase.sin() * weight_sin.double()).sum()
    (expected,) = torch.autograd.grad(loss, log_theta)

    assert ours.dtype == torch.float64
    assert ((ours - expected).abs() / (positions[..., None] * rope()).norm(dim=(0, 1))).max() < 1e-6


def test_rotate_half_equals_hugging_face() -> None:
    q, k = torch.randn(2, 2, 3, 17, 32, generator=torch.Generator().manual_seed(2)).unbind(0)
    cos, sin = cos_sin(torch.arange(17).expand(2, -1), rope(16))
    expected = apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for x, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, cos[:, None], sin[:, None], "half"), wanted, rtol=0, atol=1e-6)


def test_rotate_interleaved_equals_multiplication_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 17, 32, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(17)
    cos, sin = cos_sin(positions, rope(16))
    turned = torch.view_as_complex(x.double().unflatten(-1, (16, 2))) * torch.exp(1j * positions[:, None] * rope(16))
    expected = torch.view_as_real(turned).flatten(-2).float()
    torch.testing.assert_close(rotate(x, cos, sin, "interleaved"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotations_compose_as_a_group(layout: str) -> None:
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(4))
    first, second = torch.arange(9)[None] * 1000, torch.arange(9)[None] * 37
    twice = x
    for positions in (first, second):
        cos, sin = cos_sin(positions, rope(4))
        twice = rotate(twice, cos[:, None], sin[:, None], layout)
    cos, sin = cos_sin(first + second, rope(4))
    torch.testing.assert_close(twice, rotate(x, cos[:, None], sin[:, None], layout), rtol=0, atol=3e-6)


def test_an_unknown_layout_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layout='gptj': one of half, interleaved"):
        rotate(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1), "gptj")


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        cos_sin(torch.arange(4), torch.ones(2, 2))
