"""The choice of trained layers: by family, by name, counted like the parameters that peft makes."""

import pytest
from transformers import AutoConfig

from clex_train.adapters import lora, trained_set
from clex_train.config.adapter import AdapterConfig
from clex_train.model_config.meta_models import model_on_meta
from clex_train.model_config.size import num_parameters, num_trained
from clex_train.utils.errors import ConfigError
from tests.adapters.adapted import LONGLORA, settings
from tests.engine.test_token_loss import COMMON, FAMILIES

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "falcon": {"query_key_value", "dense"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def on_meta(family: str, **given: object):
    return model_on_meta(AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **given}))


@pytest.mark.parametrize("family", ATTENTION)
def test_all_projections_of_the_attention_are_adapted_and_no_other_layer(family):
    trained = trained_set.choose(on_meta(family), settings())
    assert {name.rpartition(".")[2] for name in trained.adapted} == ATTENTION[family]
    assert len(trained.adapted) == 2 * len(ATTENTION[family])
    assert not any("mlp" in name for name in trained.adapted)


@pytest.mark.parametrize("targets", [["attention"], ["all-linear"], ["attention", "down_proj"], ["mlp.up_proj"]])
@pytest.mark.parametrize("tied", [False, True])
def test_the_counts_are_those_of_the_parameters_that_peft_makes(targets, tied):
    model = on_meta("llama", tie_word_embeddings=tied)
    before = num_parameters(model)
    trained = trained_set.choose(model, settings(targets=targets, **LONGLORA))
    lora.inject(model, trained, seed=0)
    assert num_trained(model) == trained.num_trained
    assert num_parameters(model) == before + trained.num_adapter == trained.frozen + trained.num_trained


def test_the_output_layer_is_trained_with_the_embedding_that_it_shares_and_frozen_otherwise():
    for tied in (False, True):
        model = on_meta("llama", tie_word_embeddings=tied)
        lora.inject(model, trained_set.choose(model, settings(targets=["all-linear"], train_embeddings=True)), seed=0)
        assert model.get_input_embeddings().weight.requires_grad
        assert model.get_output_embeddings().weight.requires_grad is tied


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    for target in ("q_proj", "lm_head", "embed_out", "attention.query"):
        with pytest.raises(
            ConfigError, match=r"adapter\.targets.*no linear layer .*attention\.query_key_value"
        ) as error:
            trained_set.choose(on_meta("gpt_neox"), settings(targets=["attention", target]))
        assert f"linear layer {target};" in str(error.value)


def test_norms_without_weights_are_refused():
    with pytest.raises(ConfigError, match=r"adapter\.train_norms.*model_type=olmo"):
        trained_set.choose(on_meta("olmo"), settings(train_norms=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 0), ("alpha", 0.0), ("dropout", 1.0), ("targets", []), ("targets", ["layers.3.q_proj"]), ("alpha", 1e9)],
)
def test_settings_out_of_bounds_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{key}"):
        AdapterConfig(**{key: value})


def test_the_identity_of_a_run_counts_the_adapter_and_not_what_is_written_at_the_end():
    assert trained_set.identity("digest", AdapterConfig()) == "digest"
    same = trained_set.identity("digest", settings())
    assert trained_set.identity("digest", settings(save=True)) == same
    others = [settings(dropout=0.1), settings(targets=["q_proj"]), settings(train_norms=True)]
    assert len({same, "digest", *(trained_set.identity("digest", other) for other in others)}) == 5


def test_short_names_are_used_only_where_they_name_no_other_module():
    names = ["layers.0.attention.out", "layers.1.attention.out"]
    assert trained_set.suffixes(names, [*names, "layers.0.mlp.up"]) == ["out"]
    assert trained_set.suffixes(names, [*names, "layers.0.mlp.out"]) == names
    # peft compares the ends of names, not their parts.
    assert trained_set.suffixes(names, [*names, "layers.0.mlp.fan_out"]) == names
