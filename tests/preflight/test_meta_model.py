"""Parameter counts on the meta device, against published numbers and a small real model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from clex_train.config.engine import EngineConfig
from clex_train.model_config.meta_models import model_on_meta
from clex_train.preflight import meta_model
from tests.helpers.composing import CONF

PUBLISHED = {
    "llama2_7b": (6_738_415_616, 128),
    "llama2_13b": (13_015_864_320, 128),
    "llama3_8b": (8_030_261_248, 128),
    "mistral_7b": (7_248_023_552, 128),
    "mixtral_8x7b": (46_702_792_704, 128),
    "qwen3_8b": (8_190_735_360, 128),
    "llama3_1_8b": (8_030_261_248, 128),
    "qwen2_5_7b": (7_615_616_512, 128),
    "olmo3_7b": (7_298_011_136, 128),
    "smollm3_3b": (3_075_098_624, 128),
    "smollm2_360m": (361_821_120, 64),
    "gemma3_4b": (4_300_079_472, 256),
    "phi4_mini": (3_836_021_760, 96),
    "phi2": (2_779_683_840, 32),
    "gpt_neox_20b": (20_554_567_680, 24),
}
"""Parameters of the safetensors according to the hub's page of the model, and the rotary dimension."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_architectures_have_the_published_number_of_parameters(name):
    counts = meta_model.count(model_on_meta(AutoConfig.from_pretrained(CONF / "model" / "architectures" / name)))
    total, rotary_dim = PUBLISHED[name]
    assert counts.total == counts.trainable == total == sum(counts.blocks)
    assert 2 * len(counts.base_inv_freq) == rotary_dim


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_are_the_embedding_the_layers_and_the_rest(tied):
    arch = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(copy.deepcopy(arch))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    counts = meta_model.count(model_on_meta(arch))
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.blocks == (3200, layer, layer, layer, 32 + (0 if tied else 3200))
    assert torch.equal(counts.base_inv_freq, model.model.rotary_emb.inv_freq.double())


def test_a_model_without_rope_is_refused_by_its_type():
    with pytest.raises(ValueError, match="model_type=gpt2"):
        meta_model.count(model_on_meta(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)))


def test_counting_does_not_change_the_architecture():
    arch = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4)
    before = arch.to_dict()
    meta_model.count(model_on_meta(arch))
    meta_model.footprint(
        arch,
        rows=1,
        tokens=16,
        dtype=torch.bfloat16,
        attention="sdpa",
        engine=EngineConfig(activation_checkpointing=True),
        learns_frequencies=True,
    )
    assert arch.to_dict() == before
