"""The export program for transformers and vLLM: what it writes and prints, and refusals in one line."""

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from clex_train.cli import export as program
from clex_train.config.attention import AttentionConfig
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale
from clex_train.console import program as console
from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score
from clex_train.export import weight_copies
from clex_train.tracking import run_folder
from tests.export.engine_check import check
from tests.export.harsh_models import T, load, load_plain, log_p, save_harsh
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """Save a run of a Llama with a harsh field."""
    return save_harsh(tmp_path / "run" / "final", "llama")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, program: ModuleType = program) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    return console.run(program.main, program.usage)


def test_a_run_is_exported_with_its_record_tokenizer_and_perplexities(final, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "run" / "evaluation").mkdir()
    scores = [Score("trained", "one_shot", n, "clex", t, [3.0 * n], n, 0.1) for n, t in ((16, 1.0), (64, 4.0))]
    origin = Origin("a", ["evaluate"], {"path": "x", "hash": "h"}, {"path": "s", "fingerprint": "f"}, {})
    windows = {"count": 1, "length": 64, "documents": [0], "fingerprint": "f"}
    results.write(tmp_path / "run" / "evaluation" / "a.json", Results(scores, CONTEXT, windows), origin)
    output = tmp_path / "out"
    assert call(monkeypatch, f"run={tmp_path / 'run'}", "format=huggingface", "length=60", f"output={output}") == 0
    assert f"written to {output}: t = 4, up to 64 tokens" in capsys.readouterr().out
    check(output, load(final))
    record = json.loads((output / "clex_export.json").read_text())
    expected = {"t": T, "context_len": CONTEXT, "served_len": 64, "digest": "harsh", "log_scale": "off"}
    assert record.items() >= expected.items()
    card = (output / "README.md").read_text()
    assert "| 64 | one_shot | 4 | 20.09 | yes |" in card
    assert "| 16 | one_shot | 1 | 20.09 | no |" in card
    assert AutoTokenizer.from_pretrained(output).vocab_size == AutoTokenizer.from_pretrained(final).vocab_size
    assert not {"clex.json", "clex.safetensors", "frequencies.safetensors", "checksums.json"} & {*_names(output)}


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(("weights", "links"), [("link", 2), ("copy", 1)])
def test_weights_are_linked_or_copied(final, tmp_path, monkeypatch, weights: str, links: int) -> None:
    output = tmp_path / "out"
    arguments = (f"model={final}", "format=huggingface", "t=4", f"weights={weights}", f"output={output}")
    assert call(monkeypatch, *arguments) == 0
    assert (output / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert (output / "model.safetensors").stat().st_nlink == links
    assert not (output / "model.safetensors").is_symlink()


def test_vllm_takes_several_t_from_one_set_of_weights(final, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "with space"
    assert call(monkeypatch, f"model={final}", "format=vllm", "t=[4,2,2.5]", f"output={output}") == 0
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("vllm serve")]
    assert [(command[2], command[5:]) for command in commands] == [
        (str(output), ["--max-model-len", str(length)]) for length in (32, 40, 64)
    ]
    assert commands[0][4] == f"$(cat '{output}/t2.json')"
    assert [line.split() for line in printed.splitlines() if " tokens  " in line] == [
        ["32", "tokens", "2", "t2.json"],
        ["40", "tokens", "2.5", "t2.5.json"],
        ["64", "tokens", "4", "t4.json"],
    ]
    reference, ids = load(final), tokens(2, 32)
    override = json.loads((output / "t2.json").read_text())
    config = json.loads((output / "config.json").read_text())
    assert config["rope_parameters"] == json.loads((output / "t4.json").read_text())["rope_parameters"]
    # What vLLM does with an override: its keys replace those of config.json.
    (output / "config.json").write_text(json.dumps(config | override))
    with reference.handle.pinned(2.0):
        assert (log_p(load_plain(output), ids) - log_p(reference.model, ids)).abs().max() < 1e-4


def test_sharded_weights_are_folded_shard_by_shard(tmp_path, monkeypatch) -> None:
    final = save_harsh(tmp_path / "final", "llama", LogScale.eval)
    load_plain(final).save_pretrained(final, max_shard_size="20KB")
    (final / "model.safetensors").unlink()
    assert len(weight_copies.weight_paths(final)) > 3
    output, ids = tmp_path / "out", tokens(2, 64)
    assert call(monkeypatch, f"model={final}", "format=huggingface", "t=4", f"output={output}") == 0
    found, ours = load_plain(output), load(final).model
    assert (log_p(found, ids) - log_p(ours, ids)).abs().max() < 1e-4
    changed = [path.name for path in output.glob("*.safetensors") if path.stat().st_nlink == 1]
    assert 0 < len(changed) < len(weight_copies.weight_paths(final)) - 1, "shards without queries are linked"
    assert json.loads((output / "clex_export.json").read_text())["scale"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t=5"], "t=5: from 1 to t_max=4"),
        (["t=0.5"], "t=0.5: from 1 to t_max=4"),
        (["t=four"], "t=four: a number from 1 to t_max"),
        (["t=[2,4]"], "one scale factor; format=vllm takes several"),
        (["length=65"], "length=65: the model serves from 2 to t_max * L = 4 * 16 = 64 tokens"),
        (["t=4", "length=64"], "length=64: give it or t=4, not both"),
        ([], "t: name the scale factor, from 1 to 4"),
        (["t=4", "log_scale=always"], "log_scale=always: an engine cannot follow the length"),
        (["t=4", "format=official"], "t=4: the official layout has the whole field"),
        (["t=[2,4]", "format=vllm", "model={scaled}"], "another constant in them for each t"),
        (["t=4", "model={token}"], "log_scale=token: every query has a factor of its own position"),
        (["t=4", "model={token}", "log_scale=folded"], "no constant in the weights replaces; log_scale=off leaves it"),
        (["t=[2,4]", "format=vllm", "model={token}"], "log_scale=token: every query has a factor of its own position"),
        (["t=4", "format=gguf", "model={token}"], "log_scale=token: every query has a factor of its own position"),
        (["format=official", "model={token}"], "log_scale=token: the official layout knows `off` and `official`"),
        (["t=4", "format=vllm", "model={cohere}"], "vLLM's longrope pairs components j and j + d/2"),
        (["t=4", "format=sglang", "model={gemma}"], "SGLang drops the scaling of its config.json in silence"),
        (["t=4", "model={gpt2}"], "model_type=gpt2: no rotary position embedding"),
        (["t=4", "model={lambda}"], "trained with LM-Infinite: no engine has"),
        (["t=4", "model={clipped}"], "clip_qkv=1.0 cuts the queries"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    arguments, message, final, tmp_path, monkeypatch, capsys
) -> None:
    places = _make(tmp_path, {name for each in arguments for name in ["scaled", *MADE] if f"{{{name}}}" in each})
    arguments = ["format=huggingface", f"model={final}", *(each.format(**places) for each in arguments)]
    assert call(monkeypatch, *arguments, f"output={tmp_path / 'new' / 'out'}") == console.USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert len([line for line in error if "error" in line]) == 1
    assert not (tmp_path / "new").exists()


MADE = ("cohere", "gemma", "gpt2", "lambda", "clipped", "token")


def _make(folder: Path, names: set[str]) -> dict[str, Path]:
    places = {name: folder / name for name in ("scaled", *MADE)}
    for name in names & {"cohere", "gemma"}:
        save_harsh(places[name], name)
    if "scaled" in names:
        save_harsh(places["scaled"], "llama", LogScale.eval)
    if "token" in names:
        save_harsh(places["token"], "llama", LogScale.token)
    if "clipped" in names:
        save_harsh(places["clipped"], "olmo", LogScale.eval, clip_qkv=1.0)
    if "gpt2" in names:
        from transformers import AutoConfig

        AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=61).save_pretrained(places["gpt2"])
    if "lambda" in names:
        run = folder / "lambda_run"
        places["lambda"] = save_harsh(run / "final", "llama")
        run_folder.write_config(Config(output_dir=str(run), name="r", attention=AttentionConfig(lambda_mask=True)))
    return places


def test_a_disk_without_room_is_refused_before_anything_is_written(final, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(weight_copies.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    arguments = (f"model={final}", "format=huggingface", "t=4", "weights=copy", f"output={tmp_path / 'new' / 'out'}")
    assert call(monkeypatch, *arguments) == console.USER_ERROR
    assert "make room, name another place, or link" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_of_a_formula_is_exported_without_the_traps_of_linear_scaling(tmp_path, monkeypatch) -> None:
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": CONTEXT}
    model = tiny_model("llama", rope_parameters=parameters, **lengths)
    model.save_pretrained(tmp_path / "pi")
    assert call(monkeypatch, f"model={tmp_path / 'pi'}", "format=huggingface", f"output={tmp_path / 'out'}") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # vLLM multiplies the length of `linear` by its factor: t^2 L.
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert config["max_position_embeddings"] == config["original_max_position_embeddings"] == 64
    ids = tokens(2, 64)
    assert torch.allclose(log_p(load_plain(tmp_path / "out"), ids), log_p(model, ids), atol=1e-5)
