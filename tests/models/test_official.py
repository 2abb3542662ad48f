"""Model directories in the layout of the original CLEX code: equal logits, and refusals by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.models.official import (
    OfficialField,
    is_official,
    load_official_model,
    official_config,
    read_official_config,
    read_official_field,
)
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from tests.helpers.golden_subset import stored_lengths

# Three times the float32 error of the original code, by number of tokens (see the README of the goldens).
TOLERANCE = {32: 3e-5, 64: 3e-5, 65: 3e-5, 128: 9e-5, 200: 9e-5, 512: 4.2e-4, 1000: 1.05e-3}
LOG_SCALED_TOLERANCE = {n: max(3 * 5e-3 * n / 1000, tolerance) for n, tolerance in TOLERANCE.items()}


@pytest.fixture
def directory(tmp_path: Path, goldens: Path) -> Path:
    return write_official_directory(goldens, tmp_path)


def write_official_directory(goldens: Path, folder: Path) -> Path:
    """Write a model directory in the official layout."""
    shutil.copyfile(goldens / "clex_llama.config.json", folder / "config.json")
    shutil.copyfile(goldens / "clex_llama.weights.safetensors", folder / "model.safetensors")
    return folder


def load(directory: Path) -> tuple[PreTrainedModel, RotaryHandle, OfficialField]:
    model, _ = load_official_model(directory)
    handle = install_rotary(model, model.config.max_position_embeddings)
    return model, handle, read_official_field(directory, handle.base_inv_freq)


@pytest.mark.parametrize("log_scale", [False, True])
@torch.no_grad()
def test_the_logits_match_the_original_code(tmp_path: Path, logit_goldens: Path, log_scale: bool) -> None:
    directory = write_official_directory(logit_goldens, tmp_path)
    change(directory, log_scale=log_scale)
    model, handle, field = load(directory)
    expected = load_file(logit_goldens / "clex_eval_tanh.safetensors")
    assert field.log_scale == ("official" if log_scale else "off")
    assert field.context_len == 64
    handle.use(field.clex.table(scale_grid(16.0)))
    install_log_scaling(model, field.log_scale, field.context_len, handle.on_length)
    for length in stored_lengths(expected):
        tolerance = (LOG_SCALED_TOLERANCE if log_scale else TOLERANCE)[length]
        logits = model(expected["input_ids"][None, :length], use_cache=False).logits[0]
        name = f"tanh.log{int(log_scale)}.{length}.logits"
        rows = slice(None) if len(expected[name]) == length else expected[f"rows.{length}"]
        assert torch.allclose(logits[rows], expected[name], atol=tolerance, rtol=0), f"N={length}"
        assert torch.allclose(logits[-1].double(), expected[f"{name}_last_f64"], atol=tolerance, rtol=0), f"N={length}"


@torch.no_grad()
def test_the_logits_are_the_same_through_the_cache_in_chunks_below_one_crossing(directory: Path, goldens: Path) -> None:
    model, handle, field = load(directory)
    handle.use(field.clex.table(scale_grid(16.0)))
    ids = load_file(goldens / "clex_eval_tanh.safetensors")["input_ids"][None, :200]
    whole = model(ids).logits
    with handle.fixed(200):
        cache = model(ids[:, :120], use_cache=True).past_key_values
        rest = model(ids[:, 120:], past_key_values=cache).logits
    assert torch.allclose(rest, whole[:, 120:], atol=1e-4, rtol=0)


def test_the_official_config_is_written_unchanged(directory: Path) -> None:
    model, _, field = load(directory)
    given = json.loads((directory / "config.json").read_text())
    written = official_config(model.config, field.clex, field.context_len, log_scale=False)
    for key in ("rope_scaling", "rope_theta", "log_scale", "max_position_embeddings", "hidden_size", "model_type"):
        assert written[key] == given[key], key


def test_only_a_directory_with_clex_scaling_is_official(directory: Path, tmp_path: Path) -> None:
    assert is_official(directory)
    assert read_official_config(directory).rope_parameters["rope_type"] == "default"
    change(directory, rope_scaling=None)
    assert not is_official(directory)
    assert not is_official(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r'rope_scaling=None: "type": "clex" is expected'):
        load_official_model(directory)


def test_weights_without_a_field_are_refused(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "ode_up" not in k}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="ode_up_proj: not an official CLEX checkpoint"):
        load(directory)


def test_a_field_of_another_rotary_dimension_names_both_shapes(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    key = "model.clex_layer.proj_func.ode_up_proj"
    save_file({**weights, key: torch.zeros(24, 32)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"\(24, 32\): the model's 16 rotated pairs"):
        load(directory)


def test_an_unreadable_config_is_named(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable config"):
        is_official(directory)


def test_partial_rotary_models_keep_their_rotary_dimension_in_the_written_config() -> None:
    config = AutoConfig.for_model("phi", partial_rotary_factor=0.4, rope_theta=10000.0)
    clex = Clex(10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16), t_max=16.0)
    assert official_config(config, clex, 2048, log_scale=False)["partial_rotary_factor"] == 0.4


def test_frequencies_of_another_scaling_cannot_use_the_official_layout() -> None:
    config = AutoConfig.for_model("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0})
    clex = Clex(10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16) / 2, t_max=16.0)
    with pytest.raises(ValueError, match="rope_type=linear: the official layout starts from rope_theta=10000"):
        official_config(config, clex, 2048, log_scale=False)


def change(directory: Path, **facts: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
