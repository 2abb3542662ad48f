"""What an export must not say or write: constants of another length, masks, foreign files, limits of a tokenizer."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from clex_train.cli import rope as rope_program
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.console import program as console
from clex_train.export.factors import Source
from clex_train.export.final import write_final
from clex_train.export.model_card import Measured, _holds
from clex_train.export.stated_config import config_at
from clex_train.inspection import inspect_model
from clex_train.models import directory
from clex_train.models.load import trained_architecture
from clex_train.utils import log
from tests.evaluation.model_directories import save_tokenizer
from tests.export.harsh_models import T, harsh_model, load, load_plain, log_p, save_harsh
from tests.export.test_export_program import call
from tests.export.test_final import training_config, write
from tests.rope.rotary_families import CONTEXT, VOCABULARY, tiny_model, tokens

LISTS = {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": CONTEXT}


def with_t_factor(final: Path, t_factor: float) -> Path:
    """Let the model use the t of contexts `t_factor` times as long."""
    clex, table, record = directory.read_clex(final)
    directory.write_clex(final, clex, replace(table, t_factor=t_factor), CONTEXT, LogScale(record.log_scale))
    return final


@pytest.mark.parametrize(("asked", "length"), [("length=32", 32), ("length=24", 24), ("length=60", 60), ("t=2", 16)])
def test_the_constant_is_that_of_the_length_at_which_the_product_uses_this_t(
    asked: str, length: int, tmp_path, monkeypatch
) -> None:
    final = with_t_factor(save_harsh(tmp_path / "final", "llama", LogScale.eval), 2.0)
    output, ids = tmp_path / "out", tokens(2, length)
    assert call(monkeypatch, f"model={final}", "format=huggingface", asked, f"output={output}") == 0
    assert (log_p(load_plain(output), ids) - log_p(load(final).model, ids)).abs().max() < 1e-4
    record = json.loads((output / "clex_export.json").read_text())
    assert record["scale_len"] == length
    assert record["scale"] == pytest.approx(max(1.0, torch.log(torch.tensor(length)).item() / 2.772588722239781))


def test_the_card_says_which_perplexities_the_export_has(tmp_path) -> None:
    facts = {"t": 4.0, "log_scale": "eval", "log_scale_of_run": "eval", "scale_len": 64}
    at = Measured(64, 4.0, "one_shot", 20.0)
    assert _holds(at, facts)
    assert not _holds(replace(at, protocol="chunked"), facts)
    assert not _holds(replace(at, length=32), facts)
    assert not _holds(at, facts | {"log_scale": "off"})
    assert _holds(replace(at, length=32), facts | {"log_scale": "off", "log_scale_of_run": "off"})


def test_a_model_with_the_lambda_mask_is_refused_elsewhere_and_by_every_export(tmp_path, monkeypatch, capsys) -> None:
    save_tokenizer(tmp_path / "tokenizer", VOCABULARY)
    loaded = harsh_model("llama")
    loaded.lambda_mask = True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    write_final(tmp_path / "final", loaded, loaded.model.state_dict(), tokenizer)
    with pytest.raises(ValueError, match="clex_llama"):
        AutoConfig.from_pretrained(tmp_path / "final")
    assert "no other program has LM-Infinite's mask" in directory.read_record(tmp_path / "final").unstated
    for target in ("huggingface", "vllm", "gguf"):
        arguments = (f"model={tmp_path / 'final'}", f"format={target}", "t=4", f"output={tmp_path / 'out'}")
        assert call(monkeypatch, *arguments) == console.USER_ERROR
        assert "trained with LM-Infinite: no engine has" in capsys.readouterr().err


def test_a_tokenizer_that_would_limit_vllm_is_raised_to_the_served_length(tmp_path, monkeypatch) -> None:
    final = save_harsh(tmp_path / "final", "llama")
    path = final / "tokenizer_config.json"
    before = json.loads(path.read_text()) | {"model_max_length": CONTEXT}
    path.write_text(json.dumps(before))
    output = tmp_path / "out"
    assert call(monkeypatch, f"model={final}", "format=huggingface", "t=4", f"output={output}") == 0
    assert json.loads((output / "tokenizer_config.json").read_text()) == before | {"model_max_length": 64}
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t=4", "log_scale=folded"], "log_scale=folded: the run has scaling.log_scale=off: there is nothing to fold"),
        (["t=[2.0000001,2.0000003]", "format=vllm"], "two of them would be written to t2.json"),
        (["t=4", "output={link}"], "exists already; name another directory"),
        (["t=4", "model={nested}"], "its index names files in other folders"),
        (["format=official", "model={phi3}"], "attention factor=1.22474: the official layout has none"),
        (["t=4", "format=gguf", "model={ministral}"], "for a temperature by position"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    places = {name: tmp_path / name for name in ("link", "nested", "phi3", "ministral", "final")}
    save_harsh(places["final"], "llama")
    places["link"].symlink_to(tmp_path / "nowhere")
    if any("nested" in each for each in arguments):
        nest(save_harsh(places["nested"], "llama"))
    if any("phi3" in each for each in arguments):
        save_harsh(places["phi3"], "phi3", rope_parameters=LONGROPE | LISTS | {"partial_rotary_factor": 1.0})
    if any("ministral" in each for each in arguments):
        save_harsh(places["ministral"], "ministral3")
    given = [f"model={places['final']}", "format=huggingface", f"output={tmp_path / 'new' / 'out'}"]
    assert call(monkeypatch, *given, *(each.format(**places) for each in arguments)) == console.USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "new" / "out").exists()
    assert not (tmp_path / "nowhere").exists()


def nest(folder: Path) -> None:
    """Move the weights into a folder of their own, which an index may name."""
    names = list(load_plain(folder).state_dict())
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards" / "model.safetensors")
    weights = {name: "shards/model.safetensors" for name in names if name != "lm_head.weight"} | {
        "lm_head.weight": "shards/model.safetensors"
    }
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_log_scaling_of_latent_attention_is_stated_by_no_config(family: str, tmp_path: Path) -> None:
    final = write(tmp_path, family, LogScale.eval)
    record = directory.read_record(final)
    assert record.stated_t is None
    assert "log-scaling reaches whole heads" in record.unstated
    assert directory.read_record(write(tmp_path / "off", family)).stated_t == T


def test_the_rope_program_reads_a_final_that_others_refuse(tmp_path, monkeypatch, capsys) -> None:
    final = write(tmp_path, "gpt_neox", LogScale.eval)
    assert call(monkeypatch, f"model={final}", program=rope_program) == 0
    printed = capsys.readouterr().out
    assert "refuses config.json: log_scale=eval: log-scaling reaches whole heads" in printed
    reading = inspect_model.inspect(ModelConfig(path=str(final)))
    assert all("clex_field_refused" in [trap.name for trap in verdict.traps] for verdict in reading.verdicts)


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_a_rope_that_follows_the_length_in_layers_with_windows_is_no_base(family: str, tmp_path: Path) -> None:
    settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": CONTEXT // 2}
    if family == "qwen2":
        settings["use_sliding_window"] = True
    model = tiny_model(family, rope_parameters=LONGROPE | LISTS, **settings)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"rope_type=longrope of model_type={family}: layers 0 see at most L tokens"):
        trained_architecture(training_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


def test_a_longrope_with_equal_lists_was_extended_before(tmp_path: Path) -> None:
    equal = LONGROPE | {"short_factor": [2.0] * 6, "long_factor": [2.0] * 6}
    lengths = {"max_position_embeddings": 4 * CONTEXT, "original_max_position_embeddings": CONTEXT}
    tiny_model("llama", rope_parameters=equal, **lengths).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scaling\.name=clex: this model's context was extended before"):
        trained_architecture(training_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


def test_our_programs_leave_out_transformers_warning_about_the_keys_for_vllm_alone(tmp_path: Path, caplog) -> None:
    final, logger = write(tmp_path, "llama", LogScale.eval), logging.getLogger("transformers.modeling_rope_utils")
    for is_ours in (True, False):
        caplog.clear()
        if is_ours:
            logger.addFilter(log.is_for_the_user)
        with caplog.at_level(logging.WARNING), propagating("transformers"):
            AutoConfig.from_pretrained(final)
            assert any("_mscale" in line for line in caplog.messages) is not is_ours
            logger.warning("Unrecognized keys in `rope_parameters` for 'rope_type'='longrope': {'beta', 'long_mscale'}")
            assert "beta" in caplog.text
        logger.removeFilter(log.is_for_the_user)


@contextmanager
def propagating(name: str) -> Iterator[None]:
    """Let the messages of a library reach pytest."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def test_final_t_folds_the_constant_of_the_longest_length_that_uses_it(tmp_path: Path) -> None:
    loaded = harsh_model("llama", LogScale.eval)
    loaded.table = replace(loaded.table, t_factor=2.0)
    source = Source(loaded.model.config, loaded.handle, CONTEXT, loaded.clex, loaded.table, LogScale.eval)
    assert [source.longest_at(t) for t in (1.0, 2.0, 4.0)] == [8, 16, 64]
    assert config_at(source, 2.0, False).rope_parameters["attention_factor"] == pytest.approx(1.0)
    assert config_at(source, 4.0, False).rope_parameters["attention_factor"] == pytest.approx(1.5**0.5)
