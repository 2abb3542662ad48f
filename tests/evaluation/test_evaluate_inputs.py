"""Inputs of the evaluate program: one-line refusals before weights are read, and key names."""

import os
import re
import shutil
from pathlib import Path

import pytest

from clex_train.cli import evaluate as program
from clex_train.cli import loading
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.tracking.run_folder import as_yaml
from tests.evaluation.evaluate_program import call
from tests.evaluation.model_directories import save_clex_model


def test_an_unfinished_run_is_refused_with_how_to_finish_it(places, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "config.yaml").write_text(as_yaml(Config()))
    assert call(monkeypatch, f"run={tmp_path}") == console.USER_ERROR
    assert "not finished (no final/); start the same training command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data={store}"], "run: name either run=FOLDER or model=DIR"),
        (["model={model}"], "data: model=DIR needs a store"),
        (["model={model}", "data={store}", "revision=abc"], "revision=abc: is of a hub repository, and {model} is"),
        (["run={model}", "revision=abc"], "revision=abc: is of a hub repository, and {model} is a folder"),
        (
            ["model={model}", "data={store}", "label=../../evil"],
            "label=../../evil: it names the file of results",
        ),
        (["model={model}", "data={store}", "label=''"], "label='': it names the file of results: a plain name"),
        (["model={model}", "data={store}", "output=''"], "output='': name a JSON file, or leave the key out"),
        (["model={model}", "data={store}", "task_lengths=[]"], "task_lengths=[]: one or more lengths"),
        (["model={model}", "data={store}", "lenghts=[16]"], "lenghts"),
        (["model={model}", "data={store}", "methods=[yarn7]"], "methods[0]: "),
        (["model={model}", "data={store}", "chunk_len=many"], "chunk_len: "),
        (["model={model}", "data={store}", "chunk_len=0"], "chunk_len=0"),
        (["model={model}", "data={store}", "lengths=[16,24]"], "lengths=[16, 24]"),
        (["model={model}", "data={store}", "lengths=[16,256]"], "none of the 3 validation documents is that long"),
        (["model={model}", "data={other}", "lengths=[16]"], "tokenized with another tokenizer"),
        (["model={root}/nowhere", "data={store}"], "model={root}/nowhere: no such directory"),
        (["model={store}", "data={store}"], "model={store}: no readable config.json"),
        (["run={root}/nowhere"], "run={root}/nowhere: no such folder"),
        (["run={model}"], "not a run folder (no config.yaml)"),
        (["model={model}", "data={root}/nowhere"], "data={root}/nowhere: no such directory"),
        (["model={model}", "data={store}", "protocols=[streaming]", "methods=[ntk]"], "['ntk']: streaming knows"),
        (["model={model}", "data={store}", "protocols=[streaming,one_shot]"], "evaluate it alone"),
        (
            ["model={model}", "data={store}", "protocols=[streaming]", "methods=[none]", "stream_tokens=999"],
            "stream_tokens=999: {store} has 293 validation tokens",
        ),
        (
            ["model={model}", "data={store}", "lengths=[16,64]", "protocols=[sliding]", "stride=17"],
            "stride=17: more than the shortest of lengths=[16, 64]",
        ),
        (
            ["model={model}", "data={store}", "lengths=[8,64]", "protocols=[last_k]"],
            "last_k=16: more than the shortest of lengths=[8, 64]",
        ),
        (["model={model}", "data={train_only}", "lengths=[16]"], "the store has no validation documents"),
        (["model={model}", "data={store}", "methods=[]"], "methods=[]: one or more methods"),
        (["model={model}", "lengths=[open"], "lengths=[open: the value is not valid YAML"),
        (["verbose"], "arguments have the form key=value"),
    ],
)
def test_bad_input_is_refused_in_one_line_with_its_key(places, monkeypatch, capsys, arguments, message) -> None:
    status = call(monkeypatch, *(argument.format(**places) for argument in arguments))
    error = capsys.readouterr().err
    assert status == console.USER_ERROR
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1
    assert not re.search(r"\b(model|data|evaluation|attention)\.\w+=", error), "a key that this program does not have"


def test_refusals_of_the_model_of_a_run_name_the_run(places, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "mine" / "final").mkdir(parents=True)
    shutil.copy(Path(places["model"]) / "config.json", tmp_path / "mine" / "final")
    (tmp_path / "mine" / "config.yaml").write_text(as_yaml(Config()))
    assert call(monkeypatch, f"run={tmp_path / 'mine'}", f"data={places['store']}") == console.USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith(f"error: run={tmp_path / 'mine' / 'final'}: no weights in it (model.safetensors or an index")
    assert line.endswith("give a directory that save_pretrained writes\n"), "and no remedy of training's"


def test_the_log_names_the_keys_as_typed(places, tmp_path, monkeypatch, caplog) -> None:
    keys = ["lengths=[16]", "methods=[none]", "num_windows=999", f"output={tmp_path / 'x.json'}"]
    assert call(monkeypatch, f"model={places['model']}", f"data={places['store']}", *keys) == 0
    assert any(line.startswith("num_windows=999: ") for line in caplog.messages)


def test_results_of_another_model_are_refused_in_the_folder_of_a_run(places, tmp_path, monkeypatch, capsys) -> None:
    """Refuse, since a report of the run would include them; the final/ of the run itself is allowed."""
    monkeypatch.chdir(tmp_path)
    save_clex_model(tmp_path / "runs" / "mine" / "final")
    (tmp_path / "runs" / "mine" / "config.yaml").write_text(as_yaml(Config()))
    shutil.copytree(places["model"], tmp_path / "models" / "mine")
    keys = (f"data={places['store']}", "lengths=[16]", "methods=[none]", "num_windows=2", "precision=fp32")
    assert call(monkeypatch, "model=models/mine", *keys) == console.USER_ERROR
    assert "label=mine: runs/mine is a training run, and model=models/mine is not of it" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "mine" / "evaluation").exists()
    assert call(monkeypatch, "model=models/mine", *keys, "label=base") == 0
    assert call(monkeypatch, "model=runs/mine/final", *keys) == 0
    assert (tmp_path / "runs" / "base" / "evaluation" / "base.json").is_file()
    assert (tmp_path / "runs" / "mine" / "evaluation" / "mine.json").is_file()


def test_an_unwritable_output_is_refused_before_weights_are_read(places, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(program, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("kept")
    keys = [f"model={places['model']}", f"data={places['store']}", "lengths=[16]", "methods=[none]"]
    for output, reason in (("file/deep/result.json", "is a file, not a folder"), (".", "it is a folder")):
        assert call(monkeypatch, *keys, f"output={tmp_path / output}") == console.USER_ERROR
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith("error: output=")
        assert reason in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_or_a_too_long_name_is_refused_and_not_changed(places, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(program, "load", lambda *_: pytest.fail("weights were read"))
    os.mkfifo(tmp_path / "pipe")
    keys = [f"model={places['model']}", f"data={places['store']}", "lengths=[16]", "methods=[none]"]
    too_long = "a name of more than 255 bytes"
    refused = {"pipe": "it is a device or a pipe", "é" * 126 + ".json": too_long, "x" * 252: too_long}
    for name, reason in refused.items():
        assert call(monkeypatch, *keys, f"output={tmp_path / name}") == console.USER_ERROR
        [said] = capsys.readouterr().err.strip().splitlines()
        assert said.startswith(f"error: output={tmp_path / name}: {reason}")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()
    loading.require_writable(tmp_path / ("x" * 250 + ".json"))


def test_help_names_every_key(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for key in program.EvaluateConfig.__dataclass_fields__:
        assert f"\n  {key} (" in printed
