"""Through the real program: a damaged checkpoint is passed over or refused, code in one is not run, a full disk met."""

import errno
import json
import os
import shutil

import pytest
import torch

import train
from clex_train.checkpoint import manifest, writer
from clex_train.checkpoint.safe_load import RunsCode
from clex_train.console import program
from clex_train.utils import files
from tests.helpers.composing import composed


@pytest.fixture(scope="module")
def arguments(tiny_store, tiny_architecture):
    return (
        "+experiment=tiny_base",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "model.context_len=32",
        "data.seq_len=32",
        "evaluation=never",
        "evaluation.lengths=[32,64]",
        "optim.batch_rows=2",
        "optim.steps=4",
        "checkpoint.every=2",
        "checkpoint.keep_last=8",
    )


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run of four steps with checkpoints of the second and the fourth."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.run(composed(*arguments, f"output_dir={folder}")) == 4
    return folder


@pytest.fixture
def left(finished, tmp_path):
    """A copy of it as if the final model had not been written yet."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("final"))
    return folder


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_named_and_the_run_goes_on_from_before(arguments, left, finished, caplog):
    (path,) = (left / "checkpoints" / "step_4").glob("*optim_states.pt")
    flip(path, 5000)
    assert train.run(composed(*arguments, f"output_dir={left}")) == 4
    assert f"step_4 is damaged: {path.name} does not have its SHA-256" in caplog.text
    saved = [(folder / "final" / "model.safetensors").read_bytes() for folder in (left, finished)]
    assert saved[0] == saved[1]


def test_strict_refuses_it_in_one_line_with_the_exit_code_of_bad_input(arguments, left, capsys):
    flip(left / "checkpoints" / "step_4" / "manifest.json", 40)
    with pytest.raises(ValueError, match=r"resume=strict: checkpoint .*step_4 is damaged: manifest\.json") as refused:
        train.run(composed(*arguments, f"output_dir={left}", "resume=strict"))
    capsys.readouterr()
    assert program.report(refused.value) == program.USER_ERROR
    assert capsys.readouterr().err == f"error: {refused.value}\n"
    assert "\n" not in str(refused.value)


def test_code_in_a_checkpoint_is_refused_before_the_model_is_loaded(arguments, left, tmp_path, monkeypatch):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = left / "checkpoints" / "step_4"
    (path,) = folder.glob("*model_states.pt")
    torch.save({"module": Harmful()}, path)
    genuine = json.loads((folder / "manifest.json").read_text())
    genuine["files"][path.name], genuine["sha256"][path.name] = path.stat().st_size, files.sha256(path)
    (folder / "manifest.json").write_text(manifest.Manifest(**genuine).render())
    monkeypatch.setattr("clex_train.models.load.load_for_training", None)
    with pytest.raises(RunsCode, match=r"refused, it would call posix\.system; nothing was run") as refused:
        train.run(composed(*arguments, f"output_dir={left}"))
    assert program.report(refused.value) == program.USER_ERROR
    assert not (tmp_path / "ran").exists()


def test_training_goes_on_without_a_checkpoint_that_finds_no_room(arguments, tmp_path, monkeypatch, caplog):
    real, folder = writer.write, tmp_path / "run"

    def full(state, path):
        if "step_2" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(state, path)

    monkeypatch.setattr(writer, "write", full)
    assert train.run(composed(*arguments, f"output_dir={folder}", "checkpoint.on_full_disk=continue")) == 4
    assert "training continues without it" in caplog.text
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"latest", "step_4"}
    waits = [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if "save_seconds" in row]
    assert [row["step"] for row in waits] == [2, 4]
    assert all(row["save_seconds"] > 0 for row in waits)
