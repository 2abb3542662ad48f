"""Damaged checkpoints, checkpoints that carry code, and full disks, through train.py in this process."""

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
    """Run four steps, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.run(composed(*arguments, f"output_dir={folder}")) == 4
    return folder


@pytest.fixture
def unfinished(finished, tmp_path):
    """Copy the finished run without its final model, as if it had been interrupted."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("final"))
    return folder


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_reported_and_the_run_resumes_from_the_previous_checkpoint(
    arguments, unfinished, finished, caplog
):
    (path,) = (unfinished / "checkpoints" / "step_4").glob("*optim_states.pt")
    flip(path, 5000)
    assert train.run(composed(*arguments, f"output_dir={unfinished}")) == 4
    assert f"step_4 is damaged: {path.name} does not have its SHA-256" in caplog.text
    saved = [(folder / "final" / "model.safetensors").read_bytes() for folder in (unfinished, finished)]
    assert saved[0] == saved[1]


def test_strict_resume_refuses_a_damaged_checkpoint_with_exit_code_2(arguments, unfinished, capsys):
    flip(unfinished / "checkpoints" / "step_4" / "manifest.json", 40)
    with pytest.raises(ValueError, match=r"resume=strict: checkpoint .*step_4 is damaged: manifest\.json") as refused:
        train.run(composed(*arguments, f"output_dir={unfinished}", "resume=strict"))
    capsys.readouterr()
    assert program.report(refused.value) == program.USER_ERROR
    assert capsys.readouterr().err == f"error: {refused.value}\n"
    assert "\n" not in str(refused.value)


def test_code_in_a_checkpoint_is_refused_before_the_model_is_loaded(arguments, unfinished, tmp_path, monkeypatch):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = unfinished / "checkpoints" / "step_4"
    (path,) = folder.glob("*model_states.pt")
    torch.save({"module": Harmful()}, path)
    genuine = json.loads((folder / "manifest.json").read_text())
    genuine["files"][path.name], genuine["sha256"][path.name] = path.stat().st_size, files.sha256(path)
    (folder / "manifest.json").write_text(manifest.Manifest(**genuine).render())
    monkeypatch.setattr("clex_train.models.load.load_for_training", None)
    with pytest.raises(RunsCode, match=r"refused, it would call posix\.system; nothing was run") as refused:
        train.run(composed(*arguments, f"output_dir={unfinished}"))
    assert program.report(refused.value) == program.USER_ERROR
    assert not (tmp_path / "ran").exists()


def test_training_continues_when_a_checkpoint_does_not_fit_on_the_disk(arguments, tmp_path, monkeypatch, caplog):
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
