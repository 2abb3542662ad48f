"""Power cuts in a model of a file system: each final name has its new or its old content, completely.

Each writer is cut at every fsync, rename and removal, in every possible state of a journalling file system.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clex_train.config.root import Config
from clex_train.config.tracking import BackEnd
from clex_train.evaluation import results
from clex_train.export import final as save
from clex_train.tracking import environment, metrics_log, run_folder
from clex_train.tracking import tracker as tracking
from clex_train.utils import checksums, files
from clex_train.utils.errors import RunStopped
from tests.checkpoint.test_store import FileEngine, open_checkpoints, save_step
from tests.helpers.power_loss import END, Disk, Image


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _require_old_or_new(images: list[Image], name: str, old: bytes | None, new: bytes) -> None:
    """Require the file to be old or new at every moment, and new at the end."""
    for image in images:
        assert image.files.get(name) in (old, new), (image.moment, image.kind)
    last = [image for image in images if image.moment == END]
    assert all(image.files.get(name) == new for image in last)
    assert {image.files.get(name) for image in images} == {old, new}, "the model saw both states"


def _renamed_unflushed(path: Path, content: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(content)
    os.replace(beside, path)


def test_the_model_detects_that_a_rename_alone_loses_a_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    images = Disk(tmp_path).record(monkeypatch, lambda: _renamed_unflushed(path, "new"))
    assert {image.files["config.yaml"] for image in images} == {b"old", b"", b"\0\0\0", b"new"}


def test_the_model_detects_that_flushing_the_file_alone_loses_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync_directory", lambda path: None)
    images = Disk(tmp_path).record(monkeypatch, lambda: files.write_atomically(tmp_path / "a", "new"))
    assert any(image.moment == END and "a" not in image.files for image in images)


def test_a_configuration_is_old_or_new(tmp_path, monkeypatch):
    config = Config(output_dir=str(tmp_path))
    run_folder.write_config(config)
    old = (tmp_path / "config.yaml").read_bytes()
    config.name = "another"
    images = Disk(tmp_path).record(monkeypatch, lambda: run_folder.write_config(config))
    _require_old_or_new(images, "config.yaml", old, (tmp_path / "config.yaml").read_bytes())


def test_an_environment_file_is_complete_or_missing(tmp_path, monkeypatch):
    images = Disk(tmp_path).record(monkeypatch, lambda: environment.write_environment(tmp_path, 0, "f"))
    _require_old_or_new(images, "environment.json", None, (tmp_path / "environment.json").read_bytes())


def test_an_evaluation_and_its_folder_are_complete_or_missing(tmp_path, monkeypatch):
    found = results.Results([], 32, results.NO_WINDOWS)
    path = tmp_path / "run" / "evaluation" / "step_3.json"
    write = lambda: results.write(path, found, results.Origin("a", [], {}, {}))  # noqa: E731
    images = Disk(tmp_path).record(monkeypatch, write)
    _require_old_or_new(images, "run/evaluation/step_3.json", None, path.read_bytes())


def test_truncating_a_log_loses_no_remaining_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 6)]
    path.write_bytes(b"".join([*lines[:2], b"damaged\n", *lines[2:]]))
    images = Disk(tmp_path).record(monkeypatch, lambda: metrics_log.cut_back(path, 4, lambda row: None))
    for image in images:
        assert image.files["metrics.jsonl"].startswith(b"".join(lines[:2]))
        assert b"damaged\n" in image.files["metrics.jsonl"] + image.files.get("metrics.jsonl.damaged", b"")
    assert images[-1].files["metrics.jsonl"] == b"".join(lines[:4])


def test_metrics_before_a_checkpoint_are_durable(tmp_path, monkeypatch):
    config = Config()
    config.optim.steps = 9
    config.tracking.name = BackEnd.local
    tracker = tracking.Tracker(config, tmp_path, 0)

    def train() -> None:
        tracker.step({"step": 1, "loss": 1.0, "tokens_per_second": 1.0})
        tracker.saved(1, 0.5)

    images = Disk(tmp_path).record(monkeypatch, train)
    tracker.close()
    last = [image.files["metrics.jsonl"] for image in images if image.moment == END]
    assert {content.count(b"\n") for content in last} == {2}


class Weights:
    """Stand in for a model of transformers, whose safetensors are written in Rust and cannot be watched."""

    config = SimpleNamespace(use_cache=False)

    def save_pretrained(self, folder, state_dict):
        from safetensors.torch import save_file

        save_file(state_dict, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="a")


def _write_final(folder: Path, tokenizer, value: float) -> dict[str, bytes]:
    loaded = SimpleNamespace(model=Weights(), clex=None, static=None)
    save.write_final(folder, loaded, {"w": torch.full((100,), value)}, tokenizer)
    return _contents(folder)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_final_model_marked_as_finished_is_complete(tmp_path, tokenizer, monkeypatch, replaces):
    run, laid_out = tmp_path / "run", tmp_path / "image"
    run.mkdir()
    whole = [_write_final(run / "final", tokenizer, 1.0)] if replaces else []
    written = []
    images = Disk(run).record(monkeypatch, lambda: written.append(_write_final(run / "final", tokenizer, 2.0)))
    finished = 0
    for image in images:
        folder = image.write(laid_out)
        run_folder.tidy(folder)
        assert {entry.name for entry in folder.iterdir()} <= {"final"}, (image.moment, image.kind)
        if save.is_finished(folder / "final"):
            finished += 1
            assert _contents(folder / "final") in [*whole, *written], (image.moment, image.kind)
        else:
            assert image.moment != END
            assert not replaces, "one of the two was there all the time"
    assert len(images) > 15
    assert finished >= 1


def test_a_damaged_final_model_is_never_treated_as_finished(tmp_path, tokenizer):
    folder = tmp_path / "final"
    names = _write_final(folder, tokenizer, 1.0)
    assert save.is_finished(folder)
    for name, content in names.items():
        for damaged in (b"", bytes(len(content))):
            (folder / name).write_bytes(damaged)
            assert not save.is_finished(folder)
        (folder / name).write_bytes(content)
    (folder / checksums.NAME).unlink()
    assert save.is_finished(folder), "as an earlier version wrote it"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / name).write_bytes(bytes(len(names[name])))
        assert not save.is_finished(folder)
        (folder / name).write_bytes(names[name])


def test_a_checkpoint_is_complete_or_the_previous_one_is_used(tmp_path, monkeypatch):
    run, laid_out = tmp_path / "run", tmp_path / "image"
    text = "name: a\n"
    checkpoints = open_checkpoints(run, config=text, overlap=False)
    save_step(checkpoints, 5)
    save_step(checkpoints, 10)
    images = Disk(run).record(monkeypatch, lambda: save_step(checkpoints, 15))
    seen = set()
    for image in images:
        copy = open_checkpoints(image.write(laid_out), strict=True, config=text)
        engine = FileEngine()
        step, _ = copy.load(engine)
        assert engine.loaded == [step, step]
        assert (copy.folder / "latest").read_text() == f"step_{step}\n"
        assert {path.name for path in copy.folder.iterdir()} == {"latest", f"step_{step - 5}", f"step_{step}"}
        assert copy.newest().config().read_text() == text
        assert image.moment != END or step == 15
        seen.add(step)
    assert seen == {10, 15}
    assert len(images) > 15


def test_a_full_disk_at_the_final_model_stops_the_run_in_one_line(small_disk, tokenizer):
    (small_disk / "other").write_bytes(bytes(60_000))
    with pytest.raises(
        RunStopped, match=r"final: cannot be written \(No space left on device\).*make room and run"
    ) as caught:
        _write_final(small_disk / "final", tokenizer, 1.0)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in small_disk.iterdir()] == ["other"]
    (small_disk / "other").unlink()
    _write_final(small_disk / "final", tokenizer, 1.0)
    assert save.is_finished(small_disk / "final")
