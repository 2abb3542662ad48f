"""Sequence-parallel support by model family, judged from the architecture, with one-line refusals."""

import pytest
from transformers import AutoConfig

from clex_train.config.attention import AttentionImplementation
from clex_train.config.root import Config
from clex_train.preflight.sequence_parallel import check_sequence_parallel, why_not
from tests.rope.rotary_families import FAMILIES, tiny_model


def configuration(count, seq_len=64):
    config = Config()
    config.engine.sequence_parallel, config.data.seq_len = count, seq_len
    return config


def small(family, **settings):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": 40}
    return AutoConfig.for_model(family, **{**sizes, **settings})


# Custom attention, sinks of each head, windows, a temperature, a recurrent state, heads of more than one width.
UNSHARED = {
    "falcon", "gpt_oss", "olmo3", "ministral3", "qwen3_next", "qwen3_5_text", "deepseek_v2", "deepseek_v3",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNSHARED))
def test_families_that_use_the_attention_interface_are_supported(family):
    check_sequence_parallel(configuration(2), tiny_model(family).config)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        (lambda: tiny_model("falcon").config, "it cannot be called with a part of a row"),
        (lambda: small("gpt_oss", num_key_value_heads=12, head_dim=4), "layer 0 has a term for each head"),
        (lambda: small("mistral", num_key_value_heads=12, sliding_window=63), "a layer sees 63 tokens only"),
        (lambda: small("deepseek_v3", num_key_value_heads=12), "layer 0 has heads of more than one width"),
        (lambda: small("gptj", n_head=12, n_embd=48, n_layer=2), "it cannot be called with a part of a row"),
        (
            lambda: small("qwen3_next", num_key_value_heads=12, head_dim=4),
            "mixes tokens|does not go through|cannot be called",
        ),
    ],
)
def test_unsupported_architectures_are_refused_with_a_reason(arch, reason):
    with pytest.raises(ValueError, match=rf"engine\.sequence_parallel=2: model_type=.*({reason}).*set it to 1"):
        check_sequence_parallel(configuration(2), arch())


def test_a_window_as_long_as_the_row_is_allowed():
    assert why_not(small("mistral", num_key_value_heads=12, sliding_window=64), 64) is None


@pytest.mark.parametrize(
    ("count", "key_heads", "possible"), [(5, 12, "1 or 2 or 3 or 4 or 6 or 12"), (4, 3, "1 or 3 or 6 or 12")]
)
def test_indivisible_heads_are_refused_with_the_possible_counts(count, key_heads, possible):
    expected = rf"engine\.sequence_parallel={count}: .* 12 attention heads and {key_heads} key heads.*take {possible}$"
    with pytest.raises(ValueError, match=expected):
        check_sequence_parallel(configuration(count), small("llama", num_key_value_heads=key_heads))


@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_fewer_key_heads_than_ranks_are_allowed(count):
    check_sequence_parallel(configuration(count), small("llama", num_key_value_heads=1))


@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_attention_that_needs_a_mask_is_refused(name):
    config = configuration(2)
    config.attention.implementation = AttentionImplementation[name]
    with pytest.raises(ValueError, match=rf"attention\.implementation={name}: .* use sdpa or flash_attention_2"):
        check_sequence_parallel(config, small("llama", num_key_value_heads=12))


def test_nothing_is_required_without_sequence_parallelism():
    config = configuration(1)
    config.attention.implementation = AttentionImplementation.eager
    check_sequence_parallel(config, tiny_model("falcon").config)
