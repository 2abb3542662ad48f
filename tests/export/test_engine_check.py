"""Exports of every family equal the product's model at t in stock engines, and three wrong exports are caught."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.export import huggingface, serving
from clex_train.export.factors import Source, rope_at
from clex_train.export.source import read_source
from clex_train.models.load import load_for_evaluation
from clex_train.utils.errors import ConfigError
from tests.export.engine_check import TOLERANCE, check
from tests.export.harsh_models import T, harsh_model, load, load_plain, log_p, save_harsh
from tests.rope.rotary_families import CONTEXT, EXPORTED, UNEXPORTED, UNFOLDED, tokens

Parameters = dict[str, Any]


def export(directory: Path, output: Path, fold: bool = True, **model: Any) -> Path:
    """Export a directory at t = 4."""
    source = read_source(ModelConfig(path=str(directory), **model))
    huggingface.write(huggingface.plan(source, directory, T, fold), output)
    return output


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_of_every_family_is_the_model_at_t_in_every_engine(family: str, tmp_path: Path) -> None:
    directory = save_harsh(tmp_path / "final", family)
    reference = load(directory)
    with reference.handle.pinned(T), torch.no_grad():
        pinned = log_p(reference.model, tokens(2, 4 * CONTEXT))
    plain = log_p(load_plain(directory), tokens(2, 4 * CONTEXT))
    assert (plain - pinned).abs().max() > 100 * TOLERANCE, "plain RoPE is far away"
    output = export(directory, tmp_path / "out")
    check(output, reference)
    # Our own loader reads it as the model that it is, at any length up to t L.
    with torch.no_grad():
        assert (log_p(load(output).model, tokens(2, 4 * CONTEXT)) - pinned).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", UNEXPORTED)
def test_a_family_that_no_config_expresses_at_one_t_is_refused_before_anything_is_written(
    family: str, tmp_path: Path
) -> None:
    directory = save_harsh(tmp_path / "final", family)
    with pytest.raises(ConfigError, match=f"^model_type={family}: .*{UNEXPORTED[family]}") as refused:
        export(directory, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [family for family in EXPORTED if family not in UNFOLDED])
def test_the_constant_of_log_scaling_is_folded_into_the_queries_of_every_family(family: str, tmp_path: Path) -> None:
    directory = save_harsh(tmp_path / "final", family, LogScale.eval)
    reference, served = load(directory), int(T) * CONTEXT
    model = load_plain(export(directory, tmp_path / "out"))
    # Shorter contexts have another constant, so the whole length is compared, and a part of it as of the whole.
    for length in (served, CONTEXT + 1):
        ids = tokens(2, length)
        with reference.handle.fixed(served):
            assert (log_p(model, ids) - log_p(reference.model, ids)).abs().max() <= TOLERANCE
    left_out = load_plain(export(directory, tmp_path / "off", fold=False))
    assert (log_p(left_out, ids) - log_p(model, ids)).abs().max() > 30 * TOLERANCE


def reverse_factors(config: dict[str, Any], parameters: Parameters) -> None:
    for name in ("short_factor", "long_factor"):
        parameters[name] = parameters[name][::-1]


def name_the_base_length(config: dict[str, Any], parameters: Parameters) -> None:
    parameters["original_max_position_embeddings"] = CONTEXT


def leave_the_magnitude_on(config: dict[str, Any], parameters: Parameters) -> None:
    name_the_base_length(config, parameters)
    parameters["factor"] = T
    del parameters["attention_factor"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (reverse_factors, "log p differs"),
        (name_the_base_length, "vLLM: rotary table"),
        (leave_the_magnitude_on, "log p differs"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_a_wrong_export_is_caught(
    family: str, spoil: Callable[[dict[str, Any], Parameters], None], reason: str, tmp_path: Path
) -> None:
    directory = save_harsh(tmp_path / "final", family)
    output = export(directory, tmp_path / "out")
    config = json.loads((output / "config.json").read_text())
    spoil(config, config["rope_parameters"].get("full_attention", config["rope_parameters"]))
    (output / "config.json").write_text(json.dumps(config))
    # transformers 5.17 fails by itself where types of layers have longrope with L.
    with pytest.raises((AssertionError, UnboundLocalError), match=f"{reason}|long_inv_freq"):
        check(output, load(directory))


def test_reversed_factors_and_an_automatic_magnitude_change_what_transformers_computes(tmp_path: Path) -> None:
    directory, ids = save_harsh(tmp_path / "final", "llama"), tokens(2, 4 * CONTEXT)
    right = log_p(load_plain(export(directory, tmp_path / "out")), ids)
    for spoil in (reverse_factors, leave_the_magnitude_on):
        output = export(directory, tmp_path / spoil.__name__)
        config = json.loads((output / "config.json").read_text())
        spoil(config, config["rope_parameters"])
        (output / "config.json").write_text(json.dumps(config))
        wrong = log_p(load_plain(output), ids)
        assert (wrong - right).abs().max() > 100 * TOLERANCE, spoil.__name__


def test_an_export_loads_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = export(save_harsh(tmp_path / "final", "llama"), tmp_path / "out")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        caplog.clear()
        load_plain(output)
        assert caplog.text == ""
        config = json.loads((output / "config.json").read_text())
        config["rope_parameters"]["short_mscale"] = 1.0
        (output / "config.json").write_text(json.dumps(config))
        load_plain(output)
        assert "Unrecognized keys" in caplog.text, "this test would see a warning"
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


def test_an_export_states_the_dimension_of_a_head_that_engines_would_read_as_null(tmp_path: Path) -> None:
    directory = save_harsh(tmp_path / "final", "mixtral", head_dim=None)
    assert json.loads((directory / "config.json").read_text())["head_dim"] is None
    assert json.loads((export(directory, tmp_path / "out") / "config.json").read_text())["head_dim"] == 12


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": CONTEXT}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_softmax_scale_of_latent_attention_on_a_yarn_base_is_kept(family: str, tmp_path: Path) -> None:
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    directory = save_harsh(tmp_path / "final", family, rope_parameters=rope)
    reference = load_for_evaluation(ModelConfig(path=str(directory), context_len=CONTEXT))
    output = export(directory, tmp_path / "out", context_len=CONTEXT)
    model, ids = load_plain(output), tokens(2, 4 * CONTEXT)
    with reference.handle.pinned(T), torch.no_grad():
        assert (log_p(model, ids) - log_p(reference.model, ids)).abs().max() <= TOLERANCE
    assert model.model.layers[0].self_attn.scaling > 1.1 * 20**-0.5


def test_vllm_is_refused_for_latent_attention() -> None:
    source = source_of("deepseek_v3")
    with pytest.raises(ConfigError, match="model_type=deepseek_v3: vLLM reads any scaling of latent attention as YaRN"):
        serving.require_vllm(rope_at(source, T), source.arch)


def source_of(family: str) -> Source:
    """Return the records of a model in memory."""
    loaded = harsh_model(family)
    return Source(loaded.model.config, loaded.handle, CONTEXT, loaded.clex, loaded.table)
