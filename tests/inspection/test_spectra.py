"""Frequencies of an inspection against those of models that transformers has loaded, and slow float64 formulas."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.inspection import inspect_model, spectra, text
from clex_train.inspection.as_json import as_json
from clex_train.inspection.spectra import LayerRope
from clex_train.models import architecture
from clex_train.models.load import load_for_evaluation
from tests.evaluation.evaluation_models import CONTEXT_LEN
from tests.evaluation.model_directories import save_clex_model
from tests.export.harsh_models import save_harsh
from tests.export.official_directories import official_directory
from tests.inspection.saved_configs import HARSH, inspect, longrope, save_config, scaled
from tests.rope.rotary_families import tiny_model

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TYPES: dict[str, dict[str, Any]] = {
    "default": scaled("default"),
    "linear": scaled("linear", factor=3.0),
    "dynamic": scaled("dynamic", factor=4.0),
    "yarn": scaled("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama3": scaled(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "longrope": scaled(
        "longrope", short_factor=[1.0] * 6, long_factor=HARSH[:6], original_max_position_embeddings=16, factor=4.0
    ),
    "proportional": scaled("proportional", partial_rotary_factor=0.5),
}


def assert_as_loaded(folder: Path, length: int) -> tuple[LayerRope, ...]:
    """Compare theta and magnitude with the cos and sin of the loaded model at the end of a call of `length` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (module,) = (each for name, each in model.named_modules() if name.endswith("rotary_emb"))
    ropes = inspect(folder, length).ropes
    for rope in ropes:
        positions = torch.arange(length)[None]
        named = () if rope.name is None else (rope.name,)
        cos, sin = module(torch.zeros(1, length, 1), positions, *named)
        pairs = cos.shape[-1] // 2
        angle = positions[0, :, None].double() * rope.inv_freq
        assert torch.allclose(cos[0, :, :pairs].double(), angle.cos() * rope.attention_factor, atol=1e-4)
        assert torch.allclose(sin[0, :, :pairs].double(), angle.sin() * rope.attention_factor, atol=1e-4)
        prefix = "" if rope.name is None else f"{rope.name}_"
        assert torch.equal(rope.inv_freq, getattr(module, f"{prefix}inv_freq").double())
    return ropes


@pytest.mark.parametrize("length", [12, 60], ids=["within", "beyond"])
@pytest.mark.parametrize("rope_type", list(TYPES))
def test_theta_is_that_of_the_loaded_model(rope_type: str, length: int, tmp_path: Path) -> None:
    tiny_model("llama", rope_parameters=dict(TYPES[rope_type])).save_pretrained(tmp_path)
    (rope,) = assert_as_loaded(tmp_path, length)
    assert rope.rope_type == rope_type
    assert rope.num_pairs == 6
    # Dynamic scaling begins beyond L.
    assert rope.is_scaled == (rope_type != "default" and (rope_type, length) != ("dynamic", 12))


@pytest.mark.parametrize(("family", "pairs"), [("gpt_neox", 3), ("phi", 3), ("stablelm", 3), ("phi3", 6)])
def test_partial_rotary_families_have_the_pairs_of_the_loaded_model(family: str, pairs: int, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    (rope,) = assert_as_loaded(tmp_path, 12)
    assert rope.num_pairs == pairs
    assert not rope.is_scaled


def test_each_layer_type_of_gemma3_has_its_own_frequencies(tmp_path: Path) -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    tiny_model("gemma3_text", rope_parameters=parameters).save_pretrained(tmp_path)
    ropes = {rope.name: rope for rope in assert_as_loaded(tmp_path, 12)}
    assert ropes["full_attention"].is_scaled
    assert not ropes["sliding_attention"].is_scaled
    expected = 1_000_000.0 ** (-torch.arange(6, dtype=torch.float64) / 6) / 8
    assert torch.allclose(ropes["full_attention"].inv_freq, expected, rtol=1e-6)


def test_older_spellings_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    old = save_config(tmp_path / "old", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    new = save_config(tmp_path / "new", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    assert torch.equal(inspect(old).ropes[0].inv_freq, inspect(new).ropes[0].inv_freq)
    assert inspect(old).ropes[0].rope_theta == 500.0


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_a_clex_directory_has_the_table_that_evaluation_uses(t: int, tmp_path: Path) -> None:
    save_clex_model(tmp_path)
    found = inspect(tmp_path, t * CONTEXT_LEN)
    loaded = load_for_evaluation(ModelConfig(path=str(tmp_path)))
    (module,) = (each for name, each in loaded.model.named_modules() if name.endswith("rotary_emb"))
    used: list[torch.Tensor] = []
    module.register_forward_hook(lambda rotary, *_: used.append(rotary.spectrum.inv_freq.clone()))
    with torch.no_grad():
        loaded.model(torch.ones(1, t * CONTEXT_LEN, dtype=torch.int64))
    assert found.field is not None
    assert found.field.spectrum.t == t
    assert torch.equal(found.inv_freq(found.ropes[0]), used[-1])
    assert found.field.facts.loaded_t == 1


def test_an_original_clex_directory_is_solved(tmp_path: Path) -> None:
    folder = official_directory(tmp_path / "model", GOLDENS)
    found, loaded = inspect(folder), load_for_evaluation(ModelConfig(path=str(folder)))
    assert found.field is not None
    assert loaded.table is not None
    assert torch.equal(found.field.spectrum.inv_freq, loaded.table.at(loaded.table.t_max).inv_freq)


@pytest.mark.parametrize("policy", list(LogScale))
def test_the_log_scaling_of_a_field_is_stated(policy: LogScale, tmp_path: Path) -> None:
    reading = inspect(save_harsh(tmp_path, "llama", policy))
    stated = [line for line in text.lines(reading) if line.strip().startswith("logits ")]
    assert as_json(reading)["field"]["log_scale"] == policy.value
    assert len(stated) == (policy is not LogScale.off)
    assert all(f"(log_scale={policy.value})" in line for line in stated)
    assert all(policy.counts_each_token is ("no config.json states it" in line) for line in stated)


def test_a_config_that_states_one_t_of_the_field_is_recognized(tmp_path: Path) -> None:
    save_clex_model(tmp_path)
    at_three = inspect(tmp_path, 3 * CONTEXT_LEN)
    factors = (10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4) / at_three.inv_freq(at_three.ropes[0])).tolist()
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = longrope(
        3 * CONTEXT_LEN, short_factor=factors, long_factor=factors, factor=1.0, attention_factor=1.0
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3 * CONTEXT_LEN}))
    for t, stated in ((3, []), (4, ["clex_field_ignored"])):
        found = inspect(tmp_path, t * CONTEXT_LEN)
        assert found.field is not None
        assert found.field.facts.loaded_t == 3
        assert [trap.name for trap in found.verdicts[0].traps] == stated


def test_a_clex_model_whose_config_transformers_refuses_is_read_by_its_base(tmp_path: Path, monkeypatch) -> None:
    save_clex_model(tmp_path)
    base = architecture.to_read(ModelConfig(path=str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "of_no_stock_program", "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(inspect_model.architecture, "to_read", lambda model: base)
    found = inspect(tmp_path)
    assert {trap.name for verdict in found.verdicts for trap in verdict.traps} >= {"clex_field_refused"}
    assert found.ropes[0].rope_type == "default"


def test_context_is_where_a_phase_leaves_those_of_plain_rope() -> None:
    plain = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    theta = plain / torch.tensor(HARSH)
    reached = spectra.contexts(theta, plain, 256)
    for j, (fast, slow) in enumerate(zip(plain.tolist(), theta.tolist(), strict=True)):
        most = fast * 256
        if most >= 2 * math.pi:
            assert reached[j] == math.inf
        else:
            # The first position whose angle is beyond every angle of plain RoPE.
            first = next(n for n in range(1, 10_000) if slow * n > most * (1 + 1e-12))
            assert first - 1 <= reached[j] * (1 + 1e-9) < first


def test_pairs_of_frequency_zero_never_turn_and_slow_ones_turn_less_than_once(tmp_path: Path) -> None:
    folder = save_config(tmp_path, rope_parameters=scaled("proportional", partial_rotary_factor=0.5))
    (rope,) = inspect(folder).ropes
    assert spectra.still_pairs(rope.inv_freq, 256) == [4, 5, 6, 7]
    assert spectra.slow_pairs(rope.inv_freq, 256) == [j for j in range(4) if 10_000 ** (-j / 8) * 256 < 2 * math.pi]


def test_cope_pairs_that_a_factor_of_1e30_stops_are_still(tmp_path: Path) -> None:
    factors = [1.0] * 6 + [1e30] * 2
    parameters = longrope(256, short_factor=factors, long_factor=factors, attention_factor=1.0)
    (rope,) = inspect(save_config(tmp_path, rope_parameters=parameters)).ropes
    assert spectra.still_pairs(rope.inv_freq, 256) == [6, 7]


def test_relative_difference_knows_pairs_that_are_still_on_one_side_only() -> None:
    one, other = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    assert spectra.relative_difference(one, other).tolist() == [0.5, 0.0, math.inf, math.inf]
