"""`final/` states the model at t_max to other programs or makes them refuse; ours starts from the RoPE of the base."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from clex_train.api import apply_clex
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale, ScalingConfig
from clex_train.export.final import is_finished, write_final
from clex_train.models import architecture, directory
from clex_train.models.load import load_for_training, trained_architecture
from clex_train.models.tokenizer import load_tokenizer
from clex_train.utils.errors import ConfigError
from tests.evaluation.model_directories import save_tokenizer
from tests.export.harsh_models import T, harsh_model, load, load_plain, log_p, save_harsh
from tests.rope.rotary_families import CONTEXT, EXPORTED, UNEXPORTED, VOCABULARY, tiny_model, tokens

UNSTATED = [
    ("gpt_neox", LogScale.eval, {}, "log_scale=eval: log-scaling reaches whole heads"),
    ("llama", LogScale.token_eval, {}, "log_scale=token_eval: every query has a factor of its own position"),
    ("llama", LogScale.token, {}, "log_scale=token: every query has a factor of its own position"),
    ("gemma2", LogScale.off, {"sliding_window": CONTEXT // 2}, "layers 0 see at most L tokens"),
    *((family, LogScale.off, {}, reason) for family, reason in UNEXPORTED.items()),
    ("phi3", LogScale.eval, {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "whole heads"),
]
"""Models that no config.json expresses, with the reason."""


def write(
    folder: Path, family: str, log_scale: LogScale = LogScale.off, t: float | None = None, **settings: object
) -> Path:
    """Write `final/` as a run does."""
    save_tokenizer(folder / "tokenizer", VOCABULARY)
    loaded = harsh_model(family, log_scale, **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    write_final(folder / "final", loaded, loaded.model.state_dict(), tokenizer, t)
    return folder / "final"


def training_config(path: Path) -> Config:
    config = Config(model=ModelConfig(path=str(path)), scaling=ScalingConfig(name=Method.clex, t_max=T))
    config.engine.zero_stage = 0
    return config


@pytest.mark.parametrize("family", EXPORTED)
def test_plain_transformers_loads_the_model_at_t_max(family: str, tmp_path: Path) -> None:
    final, ids = write(tmp_path, family), tokens(2, int(T) * CONTEXT)
    record = directory.read_record(final)
    assert (record.stated_t, record.unstated, record.format) == (T, None, 2)
    assert is_finished(final)
    plain, ours = load_plain(final), load(final)
    for length in (CONTEXT, int(T) * CONTEXT):
        with ours.handle.pinned(T):
            assert (log_p(plain, ids[:, :length]) - log_p(ours.model, ids[:, :length])).abs().max() < 1e-4


def test_the_stated_t_can_be_chosen_and_does_not_change_the_product(tmp_path: Path) -> None:
    t, served = 2.0, 2 * CONTEXT
    final, usual = write(tmp_path / "2", "llama", LogScale.eval, t=t), write(tmp_path / "4", "llama", LogScale.eval)
    assert directory.read_record(final).stated_t == t
    assert "one scale factor t = 2" in (final / "README.md").read_text()
    plain, ours, ids = load_plain(final), load(final), tokens(2, int(T) * CONTEXT)
    assert plain.config.max_position_embeddings == served
    with ours.handle.fixed(served):
        assert (log_p(plain, ids[:, :served]) - log_p(ours.model, ids[:, :served])).abs().max() < 1e-4
    assert torch.equal(log_p(ours.model, ids), log_p(load(usual).model, ids))


def test_a_stated_t_outside_of_the_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaling.final_t=5.*from 1 to scaling.t_max=4"):
        ScalingConfig(name=Method.clex, t_max=T, final_t=5.0)
    with pytest.raises(ConfigError, match=r"for scaling=clex alone"):
        ScalingConfig(name=Method.yarn, final_t=2.0)


@pytest.mark.parametrize("log_scale", [LogScale.off, LogScale.eval])
@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere"])
def test_perplexity_at_the_stated_length_is_that_of_the_product(
    family: str, log_scale: LogScale, tmp_path: Path
) -> None:
    final, ids = write(tmp_path, family, log_scale), tokens(4, int(T) * CONTEXT)
    plain, ours = load_plain(final), load(final).model
    losses = [model(input_ids=ids, labels=ids).loss.item() for model in (plain, ours)]
    # A thousandth of the perplexity is a thousandth of a nat.
    assert abs(losses[0] - losses[1]) < 1e-5
    assert plain.config.max_position_embeddings == int(T) * CONTEXT


@pytest.mark.parametrize(
    ("family", "log_scale", "settings"),
    [*((family, LogScale.off, {}) for family in EXPORTED), ("llama", LogScale.eval, {}), *(x[:3] for x in UNSTATED)],
)
def test_loading_for_evaluation_is_exact(family: str, log_scale: LogScale, settings: dict, tmp_path: Path) -> None:
    earlier = load(save_harsh(tmp_path / "earlier", family, log_scale, **settings))
    found = load(write(tmp_path, family, log_scale, **settings))
    assert found.context_len == CONTEXT
    assert torch.equal(found.base_inv_freq, earlier.base_inv_freq)
    assert architecture.digest(found.model.config) == architecture.digest(earlier.model.config)
    for length in (CONTEXT // 2, 2 * CONTEXT, int(T) * CONTEXT):
        ids = tokens(2, length)
        assert torch.equal(log_p(found.model, ids), log_p(earlier.model, ids))


@pytest.mark.parametrize(("family", "log_scale", "settings", "reason"), UNSTATED)
def test_what_no_config_expresses_is_refused_by_other_programs(
    family: str, log_scale: LogScale, settings: dict, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    final = write(tmp_path, family, log_scale, **settings)
    assert "only clex_train reads this model" in caplog.text
    assert reason in caplog.text
    assert reason in (final / "README.md").read_text()
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"clex_{family}"):
            auto.from_pretrained(final)
    # llama.cpp's converter and vLLM go by this name.
    assert json.loads((final / "config.json").read_text())["architectures"][0].startswith("clex_")
    assert is_finished(final)
    load(final)


def test_the_tokenizer_of_a_refused_directory_is_read_without_a_log_line(tmp_path: Path) -> None:
    final, lines = write(tmp_path, "gpt_neox", LogScale.eval), []
    # transformers does not propagate its lines to the root logger.
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        found = load_tokenizer(str(final), ModelConfig(path=str(final)))
        assert lines == []
        AutoTokenizer.from_pretrained(final)
        assert any("clex_gpt_neox" in line for line in lines), "the line that the config avoids"
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert len(found) == VOCABULARY


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "phi3"])
def test_apply_clex_on_what_plain_transformers_loaded_is_the_product_and_can_be_undone(
    family: str, tmp_path: Path
) -> None:
    final, ids = write(tmp_path, family), tokens(2, 2 * CONTEXT)
    model, ours = load_plain(final), load(final)
    before, modules = log_p(model, ids), dict(model.named_modules())
    clex = apply_clex(model, final)
    for length in (CONTEXT // 2, 2 * CONTEXT):
        assert torch.equal(log_p(model, ids[:, :length]), log_p(ours.model, ids[:, :length]))
    clex.undo()
    assert torch.equal(log_p(model, ids), before)
    assert dict(model.named_modules()) == modules


def test_apply_clex_refuses_another_base_and_leaves_the_stated_model(tmp_path: Path) -> None:
    final, ids = write(tmp_path, "llama"), tokens(2, 2 * CONTEXT)
    model = load_plain(final)
    before = log_p(model, ids)
    clex, table, _ = directory.read_clex(final)
    clex.base_inv_freq.mul_(2)
    directory.write_clex(final, clex, table, CONTEXT, stated={"base_rope": _base_rope(final), "stated_t": T})
    with pytest.raises(ValueError, match=r"starts from theta\[\d\]"):
        apply_clex(model, final)
    assert torch.equal(log_p(model, ids), before)
    # A field without its directory meets the RoPE that the directory states to others.
    with pytest.raises(ValueError, match=r"starts from theta\[\d\]=.*; apply it to its own base model"):
        apply_clex(model, clex)
    assert torch.equal(log_p(model, ids), before)


def _base_rope(final: Path) -> dict | None:
    return directory.read_record(final).base_rope


@pytest.mark.parametrize(("family", "log_scale"), [("llama", LogScale.off), ("phi3", LogScale.off), ("phi", "eval")])
def test_training_continues_from_the_base_architecture(family: str, log_scale: LogScale, tmp_path: Path) -> None:
    final = write(tmp_path, family, LogScale(log_scale))
    tiny_model(family).save_pretrained(tmp_path / "base")
    configs = [training_config(path) for path in (tmp_path / "base", final)]
    archs = [architecture.to_train(config.model) for config in configs]
    assert architecture.digest(archs[0]) == architecture.digest(archs[1])
    assert trained_architecture(configs[1], archs[1]) is archs[1]
    assert [architecture.context_length(c.model, a) for c, a in zip(configs, archs, strict=True)] == [CONTEXT] * 2
    base, continued = (
        load_for_training(config, arch, torch.float32, {}) for config, arch in zip(configs, archs, strict=True)
    )
    assert torch.equal(base.base_inv_freq, continued.base_inv_freq)
    # Its own final/ states the continued model, not the one that it started from.
    continued.solve_table()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    write_final(tmp_path / "again", continued, continued.model.state_dict(), tokenizer)
    assert directory.read_record(tmp_path / "again").base_rope == _base_rope(final)


def test_a_directory_of_an_earlier_version_is_read_as_before(tmp_path: Path) -> None:
    folder = save_harsh(tmp_path / "old", "llama")
    record = json.loads((folder / "clex.json").read_text())
    for key in ("base_rope", "stated_t", "unstated"):
        assert record.pop(key) is None
    (folder / "clex.json").write_text(json.dumps(record))
    assert record["format"] == 1
    assert torch.equal(load(folder).table.inv_freq, harsh_model("llama").table.inv_freq)


def test_a_copy_whose_config_was_replaced_by_the_base_s_is_the_same_model(tmp_path: Path) -> None:
    final, ids = write(tmp_path, "llama"), tokens(2, 2 * CONTEXT)
    expected = log_p(load(final).model, ids)
    copy = tmp_path / "copy"
    shutil.copytree(final, copy)
    tiny_model("llama").config.save_pretrained(copy)
    assert torch.equal(log_p(load(copy).model, ids), expected)


@pytest.mark.parametrize("value", [3, [1, 2], {"rope_parameters": 5}, {"max_position_embeddings": "many"}])
def test_a_damaged_record_of_the_base_is_refused_in_one_line(value: object, tmp_path: Path) -> None:
    final = write(tmp_path, "llama")
    record = json.loads((final / "clex.json").read_text())
    (final / "clex.json").write_text(json.dumps(record | {"base_rope": value}))
    with pytest.raises(ValueError, match=r"clex\.json|config\.json|model\.path|model_type") as refusal:
        load(final)
    assert "\n" not in str(refusal.value)


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": CONTEXT // 2}
LISTS = {"short_factor": [1.0 + j / 10 for j in range(6)], "long_factor": [3.0] * 6}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": CONTEXT}


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("llama", YARN), ("llama", LONGROPE | LISTS), ("phi3", LONGROPE | LISTS | {"partial_rotary_factor": 1.0})],
)
def test_the_base_of_a_model_with_a_scaling_of_its_own_is_kept(
    family: str, parameters: dict[str, object], tmp_path: Path
) -> None:
    final, ids = write(tmp_path, family, rope_parameters=parameters), tokens(2, int(T) * CONTEXT)
    ours = load(final)
    factor = ours.handle.rotary.own_factor[None]
    assert factor > 1.05
    stated = json.loads((final / "config.json").read_text())["rope_parameters"]
    assert stated["attention_factor"] == stated["short_mscale"] == stated["long_mscale"] == pytest.approx(factor)
    with ours.handle.pinned(T):
        expected = log_p(ours.model, ids)
    assert (log_p(load_plain(final), ids) - expected).abs().max() < 1e-4
    assert replace(directory.read_record(final), base_rope=None) != directory.read_record(final)
