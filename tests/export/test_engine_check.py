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
from clex_train.export import huggingface
from clex_train.export.source import read_source
from tests.export.engine_check import TOLERANCE, check
from tests.export.harsh_models import T, load, load_plain, log_p, save_harsh
from tests.rope.rotary_families import CONTEXT, FAMILIES, tokens

Parameters = dict[str, Any]


def export(directory: Path, output: Path, fold: bool = True) -> Path:
    """Export a directory at t = 4."""
    source = read_source(ModelConfig(path=str(directory)))
    huggingface.write(huggingface.plan(source, directory, T, fold), output)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_of_every_family_is_the_model_at_t_in_every_engine(family: str, tmp_path: Path) -> None:
    directory = save_harsh(tmp_path / "final", family)
    reference = load(directory)
    with reference.handle.pinned(T), torch.no_grad():
        pinned = log_p(reference.model, tokens(2, 4 * CONTEXT))
    plain = log_p(load_plain(directory), tokens(2, 4 * CONTEXT))
    assert (plain - pinned).abs().max() > 100 * TOLERANCE, "plain RoPE is far away"
    check(export(directory, tmp_path / "out"), reference)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon"])
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
