"""The path of a run's untrained field: YaRN's for every RoPE, also one that the model's own config scales."""

import pytest
import torch
from transformers import LlamaConfig

from clex_train.config.method import Method
from clex_train.config.scaling import Drift, FieldKind, ScalingConfig
from clex_train.models import architecture
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling.methods import create
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.new_field import drift_shares, new_field
from tests.helpers.composing import CONF, composed

T = [1.0, 2.0, 5.0, 32.0]
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope(context_len: int, head_dim: int = 64, base: float = 500000.0, **parameters) -> Rope:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=context_len,
        rope_parameters={"rope_type": "default", "rope_theta": base} | parameters,
    )
    return base_rope(native_handle_on_meta(config, context_len))


@pytest.mark.parametrize(
    ("context_len", "head_dim", "base"), [(128, 48, 10000.0), (4096, 128, 10000.0), (131072, 64, 500000.0)]
)
def test_the_untrained_field_of_our_recipe_is_yarn_by_transformers(context_len, head_dim, base) -> None:
    plain = rope(context_len, head_dim, base)
    expected = create(Method.yarn).table(plain, T)
    scaling = composed("scaling=clex", f"model.context_len={context_len}", "dry_run=true").scaling
    made = new_field(scaling, plain).table(T)
    for t in T:
        # transformers computes in float32.
        torch.testing.assert_close(made.at(t).inv_freq, expected.at(t).inv_freq, rtol=2e-6, atol=0)
        assert made.at(t).attention_factor == pytest.approx(expected.at(t).attention_factor, rel=1e-6)


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("experiment/*_clex.yaml")))
def test_every_preset_of_our_recipe_divides_its_slowest_pair_by_t_and_keeps_its_fastest(name) -> None:
    config = composed(f"+experiment={name}", "dry_run=true")
    model = architecture.stand_in(config.model)
    arch = architecture.to_read(model)
    handle = native_handle_on_meta(arch, architecture.context_length(model, arch))
    made = new_field(config.scaling, base_rope(handle)).table([1.0, 4.0])
    divided = made.at(1.0).inv_freq / made.at(4.0).inv_freq
    assert float(divided.min()) == pytest.approx(1)
    assert float(divided.max()) == pytest.approx(4)


def test_a_model_scaled_by_its_own_config_gets_the_ramp_of_its_base() -> None:
    scaled, plain = rope(131072, **LLAMA_3), rope(131072)
    assert not torch.equal(scaled.inv_freq, plain.inv_freq)
    assert torch.equal(drift_shares(Drift.yarn, scaled), drift_shares(Drift.yarn, plain))
    made = new_field(ScalingConfig(name=Method.clex, field=FieldKind.log_time, drift=Drift.yarn), scaled).table([1.0])
    torch.testing.assert_close(made.at(1.0).inv_freq, scaled.inv_freq.double())
