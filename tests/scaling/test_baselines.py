"""Training-free frequency tables against transformers and against their formulas."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from clex_train.scaling.baselines import TABLES, none_table, ntk_table, pi_table, theta_table
from clex_train.scaling.table import scale_grid


def rope(num_pairs: int = 32, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def hugging_face(kind: str, factor: float, **arguments: float) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "factor": factor, "rope_theta": 10000.0},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **arguments)
    return inv_freq.double()


@pytest.mark.parametrize("t", [1.0, 2.0, 3.5, 16.0])
def test_pi_is_the_linear_scaling_of_hugging_face(t: float) -> None:
    table = pi_table(rope(), scale_grid(16, 0.5))
    torch.testing.assert_close(table.at(t).inv_freq, hugging_face("linear", t), rtol=3e-7, atol=0)


@pytest.mark.parametrize("t", [2.0, 4.0, 16.0])
def test_ntk_is_the_dynamic_scaling_of_hugging_face_at_its_alpha(t: float) -> None:
    # Its base grows by (factor * n / L - (factor - 1)) ^ (d / (d - 2)): with n = t * L and factor 2 that is 2t - 1.
    expected = hugging_face("dynamic", 2.0, seq_len=int(128 * t))
    torch.testing.assert_close(ntk_table(rope(), scale_grid(16)).at(t).inv_freq, expected, rtol=1e-6, atol=0)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_2t_minus_1() -> None:
    table = ntk_table(rope(), scale_grid(8))
    torch.testing.assert_close(table.inv_freq[:, 0], torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(table.inv_freq[:, -1], rope()[-1] / (2 * table.t - 1))


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_starts_at_the_base_to_the_bit(name: str) -> None:
    base = rope(base=500000.0) / 1.7
    assert torch.equal(TABLES[name](base, scale_grid(4)).at(1).inv_freq, base)
    assert TABLES[name](base, scale_grid(4)).method == name


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_single_rotated_pair_has_a_table(name: str) -> None:
    assert torch.isfinite(TABLES[name](torch.ones(1), scale_grid(4)).inv_freq).all()


def test_none_stays_at_the_base() -> None:
    assert torch.equal(none_table(rope(), scale_grid(3)).inv_freq, rope().expand(3, -1))


def test_theta_is_the_plain_rope_of_another_base_at_every_t() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": 1e6})
    expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    table = theta_table(rope(), scale_grid(4), 10000.0, 1e6)
    torch.testing.assert_close(table.inv_freq, expected.double().expand(4, -1), rtol=1e-6, atol=0)
    assert table.method == "theta"
    assert theta_table(torch.ones(0), scale_grid(2), 1e4, 1e6).num_pairs == 0
