"""Reading and writing the tensors of official checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clex_train.models.official_field import (
    DOWN,
    INV_FREQ,
    UP,
    clex_from_official,
    is_official,
    load_official,
    official_rope_scaling,
    official_tensors,
)
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid


def rope(num_pairs: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


@pytest.fixture(scope="module")
def tensors(goldens: Path) -> dict[str, torch.Tensor]:
    return load_file(goldens / "clex_llama.weights.safetensors")


@pytest.fixture(scope="module")
def rope_scaling(goldens: Path) -> dict[str, object]:
    return json.loads((goldens / "clex_llama.config.json").read_text())["rope_scaling"]


def test_an_official_checkpoint_reproduces_its_table(
    goldens: Path, tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]
) -> None:
    clex = clex_from_official(tensors, rope_scaling, rope(16))
    official = load_file(goldens / "clex_ode.safetensors")["tanh.inv_freq_1_16.f32"].double()
    assert ((clex.table(scale_grid(16)).inv_freq - official).abs() / official).max() < 6e-5
    assert clex.num_steps > 8
    assert clex.t_max == 16


def test_weights_are_written_back_bitwise_and_frequencies_within_rounding(
    tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]
) -> None:
    clex = clex_from_official(tensors, rope_scaling, rope(16))
    written = official_tensors(clex)
    assert set(written) == {f"model.{name}" for name in (UP, DOWN, INV_FREQ)}
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1.2e-7 if name.endswith("inv_freq") else 0, atol=0)
    assert official_rope_scaling(clex) == rope_scaling


@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_the_width_follows_from_the_weights(factor: float) -> None:
    source = Clex(rope(8), 4.0, param_factor=factor, act="tanh", official_ntk_base=True)
    back = clex_from_official(official_tensors(source, "transformer."), official_rope_scaling(source), rope(8))
    assert torch.equal(back.up, source.up)


def test_official_names_are_recognised_under_any_prefix(tensors: dict[str, torch.Tensor]) -> None:
    assert is_official(list(tensors))
    assert is_official({f"base.{UP}": torch.zeros(1)})
    assert not is_official(["model.embed_tokens.weight"])


def test_bfloat16_weights_are_read(tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    clex = clex_from_official(half, rope_scaling, rope(16))
    assert clex.up.dtype == torch.float32
    assert torch.equal(clex.up, half[f"model.{UP}"].float())


def test_another_rotary_dimension_is_refused_with_both_shapes(
    tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"ode_up_proj of shape \(16, 32\): .* 64 rotated pairs need \(64, 32\)"):
        clex_from_official(tensors, rope_scaling, rope(64))
    with pytest.raises(ValueError, match=r"shape \(16, 32\): .* need \(16, 64\)"):
        load_official(Clex(rope(16), 16.0, param_factor=2.0), tensors)


def test_a_missing_tensor_is_named(tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]) -> None:
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(DOWN)}
    with pytest.raises(ValueError, match=DOWN):
        clex_from_official(without, rope_scaling, rope(16))


def test_non_finite_weights_are_named(tensors: dict[str, torch.Tensor], rope_scaling: dict[str, object]) -> None:
    broken = {**tensors, f"model.{UP}": tensors[f"model.{UP}"] * float("nan")}
    with pytest.raises(ValueError, match=f"{UP}: the weights are not finite"):
        clex_from_official(broken, rope_scaling, rope(16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "linear", "factor": 2}, r"rope_scaling\.type=linear"),
        ({"type": "clex"}, r"rope_scaling\.max_factor is missing"),
        ({"type": "clex", "max_factor": 16, "act": "relu"}, "act=relu"),
    ],
)
def test_another_scaling_is_refused(tensors: dict[str, torch.Tensor], config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clex_from_official(tensors, config, rope(16))


def test_a_field_that_the_official_code_would_misread_is_not_exported() -> None:
    with pytest.raises(ValueError, match=r"scaling\.official_ntk_base=false"):
        official_rope_scaling(Clex(rope(16, 1e6), 16.0))
    assert official_rope_scaling(Clex(rope(16, 1e4), 16.0))["max_factor"] == 16
    assert official_rope_scaling(Clex(rope(16, 1e6), 16.0, official_ntk_base=True))["act"] == "silu"
