"""Recipes by formula: the config that they write has the table of the method, and nothing is scaled twice."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from clex_train.config.method import Method
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.model_config.context_length import original_context
from clex_train.rope import recipes
from clex_train.rope.probe import require_rotary
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import PositionInterpolation, pi_table

L = 128
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": L,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "partial rotary": GPTNeoXConfig(**SIZES),
    "a type per layer": Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, num_key_value_heads=1, head_dim=32),
}


def recipe(name: str, **settings) -> ScalingConfig:
    return ScalingConfig(name=Method(name), positions=Positions.skip, **settings)


def spectrum(config):
    traits = require_rotary(config)
    return traits.base[traits.scaled]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [1.0, 2.5, 16.0])
@pytest.mark.parametrize(("name", "table"), [("pi", pi_table), ("ntk", ntk_table)])
def test_frequencies_of_the_config_equal_the_table_of_the_method(family, factor, name, table):
    base = FAMILIES[family]
    expected = table(spectrum(base).inv_freq, [1.0, factor] if factor > 1 else [1.0]).at(factor)
    found = spectrum(recipes.scaled(base, recipe(name), factor, L))
    assert ((found.inv_freq - expected.inv_freq).abs() / expected.inv_freq).max() < 1e-6
    assert found.attention_factor == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_theta_is_plain_rope_at_another_base(family):
    base = FAMILIES[family]
    own = spectrum(base).inv_freq
    found = spectrum(recipes.scaled(base, recipe("theta", rope_theta=5e6), 4.0, L)).inv_freq
    assert (found - 5e6 ** -(torch.arange(len(own), dtype=torch.float64) / len(own))).abs().max() < 1e-7
    assert found[-1] < own[-1]


def test_yarn_equals_that_of_transformers_with_its_attention_factor():
    found = spectrum(recipes.scaled(FAMILIES["llama"], recipe("yarn"), 4.0, L))
    parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": L}
    expected = spectrum(LlamaConfig(**SIZES | {"max_position_embeddings": 4 * L}, rope_parameters=parameters))
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert found.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    own = spectrum(FAMILIES["llama"]).inv_freq
    assert found.inv_freq[0] == own[0]
    assert float(found.inv_freq[-1]) == pytest.approx(float(own[-1]) / 4, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_positions_do_not_change_the_frequencies(family):
    base = FAMILIES[family]
    assert torch.equal(spectrum(recipes.scaled(base, recipe("random_pos"), 16.0, L)).inv_freq, spectrum(base).inv_freq)


def test_local_layers_and_the_config_of_the_base_are_unchanged():
    base = FAMILIES["a type per layer"]
    before = base.to_json_string()
    changed = recipes.scaled(base, recipe("ntk"), 4.0, L)
    assert base.to_json_string() == before
    assert changed.rope_parameters["sliding_attention"] == base.rope_parameters["sliding_attention"]
    assert changed.rope_parameters["full_attention"] != base.rope_parameters["full_attention"]


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "theta", "random_pos"])
def test_the_file_records_both_context_lengths(name, tmp_path):
    recipes.scaled(FAMILIES["llama"], recipe(name), 2.5, L).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.max_position_embeddings, original_context(read)) == (320, L)
    assert json.loads((tmp_path / "config.json").read_text())["original_max_position_embeddings"] == L
    assert torch.equal(
        spectrum(read).inv_freq, spectrum(recipes.scaled(FAMILIES["llama"], recipe(name), 2.5, L)).inv_freq
    )


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "theta", "random_pos"])
def test_an_already_scaled_model_is_refused(name):
    for earlier in ("pi", "ntk", "theta", "random_pos"):
        once = recipes.scaled(FAMILIES["llama"], recipe(earlier), 4.0, L)
        with pytest.raises(ValueError, match=rf"^scaling\.name={name}: .*extended before, from 128 to 512 tokens"):
            recipes.scaled(once, recipe(name), 4.0, L)
    stock = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match=rf"^scaling\.name={name}: model_type=llama has rope_type=linear"):
        recipes.scaled(stock, recipe(name), 4.0, L)


def test_the_present_base_of_the_model_is_refused():
    with pytest.raises(ValueError, match=r"^scaling\.rope_theta=10000\.0: the model has 10000 already"):
        recipes.scaled(FAMILIES["llama"], recipe("theta", rope_theta=1e4), 4.0, L)


def test_a_model_without_rope_is_refused():
    with pytest.raises(ValueError, match=r"model_type=gpt2: no rotary position embedding"):
        recipes.scaled(GPT2Config(), recipe("pi"), 4.0, L)


def test_a_family_that_reads_its_base_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(PositionInterpolation, "hf_parameters", lambda self, rope, factor: {"scaling_factor": factor})
    with pytest.raises(ValueError, match=r"frequencies of model_type=llama do not follow rope_parameters"):
        recipes.scaled(FAMILIES["llama"], recipe("pi"), 4.0, L)
