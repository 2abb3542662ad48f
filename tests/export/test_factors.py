"""Factors of a model at t against a slow float64 reference, for every kind of base and for methods of a formula."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from clex_train.config.model import ModelConfig
from clex_train.export.factors import Source, rope_at
from clex_train.export.source import read_source
from clex_train.export.stock_rope import rope_parameters
from clex_train.models.directory import write_clex
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from tests.rope.rotary_families import CONTEXT, tiny_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASES = {
    "plain": {"rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8, "rope_theta": 5e5},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "rope_theta": 1e4,
        "short_factor": [1.0 + j / 10 for j in range(6)],
        "long_factor": [2.0] * 6,
    },
}


def source_of(family: str, t_max: float = 4.0, t_factor: float = 1.0, **settings: object) -> Source:
    """Return the records of a model with a trained field, whose weights do not exist."""
    arch = tiny_model(family, **settings).config
    handle = native_handle_on_meta(arch, CONTEXT)
    field = Clex(handle.base_inv_freq, t_max=t_max)
    torch.nn.init.normal_(field.down, std=0.1, generator=torch.Generator().manual_seed(1))
    # As training ends: with the solver's steps fitted to the field.
    field.refine()
    table = field.table(scale_grid(t_max))
    object.__setattr__(table, "t_factor", t_factor)
    return Source(arch, handle, CONTEXT, field, table)


@pytest.mark.parametrize("base", BASES)
def test_factors_divide_plain_rope_by_theta_of_t_for_every_base(base: str) -> None:
    source = source_of("llama", rope_parameters=dict(BASES[base]))
    rope = rope_at(source, 3.0)
    theta, num_pairs = BASES[base]["rope_theta"], len(source.handle.base_inv_freq)
    for j, factor in enumerate(rope.factors):
        # The slow way: one pair at a time, from the field itself.
        theta_j = float(source.clex.inv_freq(3.0)[j].detach())
        assert factor * theta_j == pytest.approx(theta ** (-j / num_pairs), rel=1e-5)
    assert rope.served_len == 3 * CONTEXT
    assert (rope.attention_factor > 1) == (base in ("yarn", "longrope"))
    assert len(rope.factors) == num_pairs


def test_partial_rotation_and_layer_types_are_kept() -> None:
    partial = rope_at(source_of("gpt_neox"), 2.0)
    assert partial.rotary_dim == 6
    assert rope_parameters(source_of("gpt_neox").arch, partial)["partial_rotary_factor"] == 0.5
    gemma = rope_at(source_of("gemma3_text"), 2.0)
    assert gemma.layer_type == "full_attention"
    assert gemma.local["sliding_attention"] == pytest.approx([1.0] * 6)
    assert rope_at(source_of("cohere"), 2.0).interleaved


def test_t_between_the_points_of_the_table_is_solved() -> None:
    source = source_of("llama")
    expected = source.clex.inv_freq(2.5)
    found = source.spectrum_at(2.5).inv_freq
    assert torch.allclose(found, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize(("t_factor", "length", "t"), [(1.0, 33, 3.0), (2.0, 33, 4.0), (2.0, 24, 3.0), (2.0, 64, 4.0)])
def test_a_length_takes_the_least_t_that_the_product_uses_for_it(t_factor: float, length: int, t: float) -> None:
    assert source_of("llama", t_factor=t_factor).t_for(length) == t


@pytest.mark.parametrize("t", [0.5, 4.5, float("inf")])
def test_a_t_outside_of_the_trained_range_is_refused_in_one_line(t: float) -> None:
    with pytest.raises(ValueError, match=r"t=\S+: from 1 to t_max=4, the range"):
        rope_at(source_of("llama"), t)


def test_a_length_beyond_the_table_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"length=65: the model serves from 2 to t_max \* L = 4 \* 16 = 64 tokens"):
        source_of("llama").t_for(65)


def test_methods_of_a_formula_have_the_factors_of_their_one_t(tmp_path: Path) -> None:
    settings = {"max_position_embeddings": 64, "original_max_position_embeddings": CONTEXT}
    pi = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    tiny_model("llama", rope_parameters=pi, **settings).config.save_pretrained(tmp_path / "pi")
    source = read_source(ModelConfig(config=None, path=str(tmp_path / "pi")))
    assert rope_at(source, 4.0).factors == pytest.approx([4.0] * 6, rel=1e-6)
    assert rope_at(source, 4.0).served_len == 64
    with pytest.raises(ValueError, match="t=2: no CLEX field: the frequencies of the model are fixed, at t=4"):
        rope_at(source, 2.0)


def test_dynamic_ntk_is_exported_at_any_t(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    tiny_model("llama", rope_parameters=dynamic).config.save_pretrained(tmp_path)
    source = read_source(ModelConfig(path=str(tmp_path)))
    near, far = (rope_at(source, t).factors for t in (1.0, 4.0))
    assert near == pytest.approx([1.0] * 6, rel=1e-5)
    assert far[-1] > 4 * near[-1]


def test_a_model_without_rope_is_refused_in_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=61).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type=gpt2: no rotary position embedding, so there are no frequencies"):
        read_source(ModelConfig(path=str(tmp_path)))


def test_layers_that_share_a_rope_but_keep_the_base_are_refused(tmp_path: Path) -> None:
    arch = tiny_model("gemma2", sliding_window=CONTEXT // 2).config
    arch.save_pretrained(tmp_path)
    field = Clex(native_handle_on_meta(arch, CONTEXT).base_inv_freq, t_max=2.0)
    write_clex(tmp_path, field, field.table([1.0, 2.0]), CONTEXT)
    with pytest.raises(ValueError, match="layers 0 see at most L tokens and keep the base's frequencies"):
        rope_at(read_source(ModelConfig(path=str(tmp_path))), 2.0)
