"""Checks of RoPE values and lengths in config.json: refusals with key, value and remedy."""

import json
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from clex_train.config.model import ModelConfig
from clex_train.console.errors import explain
from clex_train.console.loading_keys import NamedModel
from clex_train.model_config import config_checks
from clex_train.models import architecture

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}


@pytest.fixture
def directory(tmp_path) -> Path:
    LlamaConfig(**SIZES, max_position_embeddings=256).save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, rope: dict | None = None, **facts) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | facts
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4} | (rope or {})
    path.write_text(json.dumps(config))


def refusal(model: ModelConfig) -> str:
    """Return the line with which training and evaluation both refuse an architecture."""
    lines = set()
    for read in (architecture.to_read, architecture.to_train):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            architecture.context_source(model, read(model))
        lines.add(explain(raised.value))
    (line,) = lines
    assert line is not None, "shown as the user's mistake, with exit code 2"
    return line


@pytest.mark.parametrize("theta", [0, -5.0, 1, 0.5, 1e13, "10000", None, True, float("inf"), float("nan")])
def test_a_base_with_equal_frequencies_is_refused(directory, theta):
    change(directory, {"rope_theta": theta})
    line = refusal(ModelConfig(path=str(directory)))
    assert line.startswith(f"model.path={directory}: its config.json has rope_theta={theta!r} for RoPE, which must be")
    assert line.endswith("correct it, or copy the model's config.json again")


@pytest.mark.parametrize("theta", [0, "x", None])
def test_an_invalid_base_under_the_older_key_is_refused_too(directory, theta):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_theta": theta}))
    assert f"its config.json has rope_theta={theta!r} for RoPE" in refusal(ModelConfig(path=str(directory)))


@pytest.mark.parametrize("rope_type", ["yarnn", None, 5, []])
def test_an_unknown_type_is_refused_with_the_known_ones(directory, rope_type):
    change(directory, {"rope_type": rope_type, "factor": 2.0})
    line = refusal(ModelConfig(path=str(directory)))
    assert f"rope_type={rope_type!r} for RoPE, which must be one of default, dynamic, linear, llama3" in line


@pytest.mark.parametrize("factor", [0.5, 0, -2, 1e9, "4", None, float("nan")])
@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_a_factor_that_would_shrink_the_context_is_refused(directory, rope_type, factor):
    change(directory, {"rope_type": rope_type, "factor": factor})
    line = refusal(ModelConfig(path=str(directory)))
    assert f"its config.json has factor={factor!r} for RoPE, which must be a number from 1 to 16,384" in line


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        (YARN | {"factor": 0.25}, "factor"),
        (YARN | {"original_max_position_embeddings": -64}, "original_max_position_embeddings"),
        (YARN | {"attention_factor": 0}, "attention_factor"),
        (YARN | {"beta_fast": -1}, "beta_fast"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [0.0] * 16}, "long_factor"),
    ],
)
def test_other_invalid_values_are_named(directory, rope, key):
    change(directory, rope)
    assert f"its config.json has {key}={rope[key]!r} for RoPE" in refusal(ModelConfig(path=str(directory)))


def test_every_layer_type_is_checked():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config_checks.require_valid_rope(Gemma3TextConfig(**SIZES, rope_parameters=rope), "model")
    rope["sliding_attention"]["rope_theta"] = 0.0
    with pytest.raises(ValueError, match=r"^model: its config\.json has rope_theta=0\.0 for RoPE"):
        config_checks.require_valid_rope(Gemma3TextConfig(**SIZES, rope_parameters=rope), "model")


@pytest.mark.parametrize("rope", [{}, YARN, LLAMA3, {"rope_type": "dynamic", "factor": 2.0}, {"rope_theta": 4.6e10}])
def test_values_of_released_models_are_accepted(directory, rope):
    change(directory, rope)
    model = ModelConfig(path=str(directory))
    assert architecture.context_length(model, architecture.to_read(model)) == 256


@pytest.mark.parametrize("length", [-4, 0, 1, 10**12, 10**30])
@pytest.mark.parametrize("key", ["max_position_embeddings", "original_max_position_embeddings"])
def test_an_invalid_length_is_named_with_the_key_that_replaces_it(directory, key, length):
    change(directory, **{key: length})
    assert refusal(ModelConfig(path=str(directory))) == (
        f"{directory}/config.json: {key}={length}: must be from 2 to 134,217,728 tokens; correct it, or set the "
        "context length that the model serves by model.context_len=N"
    )
    assert refusal(NamedModel(path=str(directory))).endswith(" by context_len=N")
    named = ModelConfig(path=str(directory), context_len=256)
    assert architecture.context_length(named, architecture.to_read(named)) == 256
