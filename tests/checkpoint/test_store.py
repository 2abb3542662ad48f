"""The checkpoint store: atomic saves; partial and damaged checkpoints are skipped and never loaded."""

import errno
import json
import logging
import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clex_train.checkpoint import manifest, writer
from clex_train.checkpoint.listing import list_checkpoints
from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.safe_load import RunsCode
from clex_train.checkpoint.store import Checkpoints
from clex_train.config.checkpoint import CheckpointConfig, OnFullDisk
from clex_train.config.root import Config
from clex_train.utils import files
from clex_train.utils.errors import RunStopped

IDENTITY = Manifest.from_config(Config(), architecture="a", data_fingerprint="d")
SHARDS = ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class FileEngine:
    """Stand in for DeepSpeed's engine: save `value` in two files through its checkpoint engine."""

    def __init__(self, value: int = 0, error: Exception | None = None) -> None:
        self.state, self.error, self.loaded = torch.full((300,), value), error, None
        self.checkpoint_engine = SimpleNamespace()

    def save_checkpoint(self, folder, tag, save_latest):
        assert not save_latest
        for name in SHARDS:
            self.checkpoint_engine.save({"weights": self.state}, str(Path(folder) / tag / name))

    def load_checkpoint(self, folder, tag):
        self.loaded = [int(torch.load(Path(folder) / tag / name)["weights"][0]) for name in SHARDS]
        return tag, {}


def open_checkpoints(run_dir: Path, strict: bool = False, config: str = "", **settings: object) -> Checkpoints:
    return Checkpoints(run_dir, CheckpointConfig(**settings), IDENTITY, strict, config)


def save_step(found: Checkpoints, step: int, engine: FileEngine | None = None) -> None:
    found.save(engine or FileEngine(step), {"x": 1}, step, rows_consumed=step * 8)
    found.finish()


def steps_on_disk(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.folder.glob("step_*"))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    found = open_checkpoints(tmp_path)
    for step in (5, 10, 15):
        save_step(found, step)
    return found


def test_the_newest_checkpoints_are_kept_and_the_last_is_loaded(checkpoints):
    assert steps_on_disk(checkpoints) == [10, 15]
    assert (checkpoints.folder / "latest").read_text() == "step_15\n"
    engine = FileEngine()
    assert checkpoints.load(engine) == (15, {"x": 1})
    assert engine.loaded == [15, 15]


def test_multiples_of_keep_every_are_never_deleted(tmp_path):
    found = open_checkpoints(tmp_path, keep_last=1, keep_every=10)
    for step in range(5, 50, 5):
        save_step(found, step)
    assert steps_on_disk(found) == [10, 20, 30, 40, 45]


@pytest.mark.parametrize("name", [SHARDS[0], "ode.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "one bit"])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_loaded(checkpoints, caplog, name, damage):
    path = checkpoints.folder / "step_15" / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    path.write_bytes({"truncated": content[:-3], "longer": content + b"}{", "one bit": flipped, "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    engine = FileEngine()
    step, _ = checkpoints.load(engine)
    assert step == 10
    assert engine.loaded == [10, 10]
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "step_15" in line
    assert name in line
    with pytest.raises(ValueError, match=rf"resume=strict: checkpoint .*step_15 is damaged: {name}"):
        open_checkpoints(checkpoints.folder.parent, strict=True).choose()


def _damage(rng: random.Random, folder: Path) -> str:
    """Truncate, flip a byte of, or delete a random file of the newest checkpoint or `latest`; return a description."""
    path = rng.choice([*sorted((folder / "step_15").iterdir()), folder / "latest"])
    content, kind = path.read_bytes(), rng.choice(["truncated", "flipped", "deleted"])
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :])
    return f"{path.name} {kind}"


def test_one_hundred_random_corruptions_are_all_detected_and_never_loaded(checkpoints, tmp_path, caplog):
    rng, seen = random.Random(0), set()
    for number in range(100):
        run_dir = tmp_path / f"damaged_{number}"
        shutil.copytree(checkpoints.folder, run_dir / "checkpoints")
        done = _damage(rng, run_dir / "checkpoints")
        seen.add(done)
        caplog.clear()
        step, _ = open_checkpoints(run_dir).load(engine := FileEngine())
        # `latest` serves other readers: loading ignores it, but its damage is reported all the same.
        expected = 15 if done.startswith("latest") else 10
        assert (step, engine.loaded) == (expected, [expected, expected]), done
        assert sum("is damaged" in record.message for record in caplog.records) == 1, done
        with pytest.raises(ValueError, match=r"resume=strict: checkpoint .* is damaged") as refused:
            open_checkpoints(run_dir, strict=True).load(FileEngine())
        assert done.split()[0] in str(refused.value)
        assert "\n" not in str(refused.value)
        shutil.rmtree(run_dir)
    assert len(seen) == 15, "every kind of damage met every file"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart_from_step_0(checkpoints):
    for step in (10, 15):
        (checkpoints.folder / f"step_{step}" / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=r"step_10 is damaged: .* is missing; .*step_15.*remove it to start again"):
        checkpoints.load(FileEngine())


def test_a_partial_checkpoint_of_a_killed_save_is_ignored_and_removed(checkpoints):
    shutil.copytree(checkpoints.folder / "step_15", checkpoints.folder / "saving_step_20")
    shutil.copytree(checkpoints.folder / "step_10", checkpoints.folder / "removing_step_5")
    assert open_checkpoints(checkpoints.folder.parent, strict=True).choose().manifest.step == 15
    save_step(checkpoints, 25)
    assert steps_on_disk(checkpoints) == [15, 25]
    assert {path.name for path in checkpoints.folder.iterdir()} == {"latest", "step_15", "step_25"}


def test_a_checkpoint_of_the_first_format_still_resumes(checkpoints):
    path = checkpoints.folder / "step_15" / "manifest.json"
    old = json.loads(path.read_text())
    for key in manifest.ADDED_IN_2:
        del old[key]
    path.write_text(json.dumps({**old, "format": 1}, indent=2) + "\n")
    assert checkpoints.load(FileEngine())[0] == 15


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_failed_save_names_the_folder_and_leaves_the_others(checkpoints, monkeypatch, error, overlap):
    def fails(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(writer.torch, "save", fails)
    found = open_checkpoints(checkpoints.folder.parent, overlap=overlap)
    with pytest.raises(RunStopped, match=r"saving_step_20: cannot be written .*earlier ones are intact"):
        save_step(found, 20)
    assert found.newest().manifest.step == 15
    assert {path.name for path in found.folder.iterdir()} == {"latest", "step_10", "step_15"}
    assert (found.folder / "latest").read_text() == "step_15\n"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_full_disk_costs_only_the_checkpoint_being_written(small_disk, on_full_disk, overlap, caplog):
    found = open_checkpoints(small_disk, overlap=overlap, on_full_disk=OnFullDisk[on_full_disk])
    save_step(found, 5)
    big = FileEngine()
    big.state = torch.zeros(20_000)
    if on_full_disk == "stop":
        with pytest.raises(RunStopped, match=r"saving_step_10: cannot be written \(.*No space left.*make room"):
            save_step(found, 10, big)
    else:
        save_step(found, 10, big)
        assert "training continues without it" in caplog.text
    assert {path.name for path in found.folder.iterdir()} == {"latest", "step_5"}
    save_step(found, 15)
    assert found.load(FileEngine())[0] == 15


def test_training_does_not_change_a_checkpoint_that_is_being_written(checkpoints, monkeypatch):
    gate, save = threading.Event(), torch.save
    monkeypatch.setattr(writer.torch, "save", lambda *given: (gate.wait(600), save(*given)))
    engine = FileEngine(20)
    checkpoints.save(engine, None, 20, rows_consumed=160)
    assert checkpoints.poll() is None
    assert checkpoints.newest().manifest.step == 15
    engine.state.fill_(-1)
    gate.set()
    assert checkpoints.finish() > 0
    checkpoints.load(engine)
    assert engine.loaded == [20, 20]


def test_copies_share_memory_where_the_originals_do():
    flat = torch.arange(10.0)
    state = {"a": flat[2:4], "rest": [flat[4:], (flat.view(2, 5),)], "n": 3}
    held = writer.snapshot(state)
    flat.fill_(-1)
    assert held["a"].tolist() == [2, 3]
    assert held["rest"][1][0].shape == (2, 5)
    assert held["a"].untyped_storage()._cdata == held["rest"][0].untyped_storage()._cdata


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [*SHARDS, "ode.pt"])
def test_a_checkpoint_with_code_is_refused_without_running_it(checkpoints, tmp_path, name):
    folder, ran = checkpoints.folder / "step_15", tmp_path / "ran"
    torch.save({"weights": torch.zeros(3), "extra": Harmful(ran)}, folder / name)
    genuine = manifest.read(checkpoints.folder / "step_10")
    sizes = {file: (folder / file).stat().st_size for file in genuine.files}
    sums = {file: files.sha256(folder / file) for file in genuine.files}
    forged = Manifest(**{**vars(genuine), "step": 15, "files": sizes, "sha256": sums})
    (folder / "manifest.json").write_text(forged.render())
    with pytest.raises(RunsCode, match=rf"{name}: refused, it would call posix.system; nothing was run"):
        checkpoints.load(FileEngine())
    assert not ran.exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("architecture", "b", "another architecture"),
        ("data_fingerprint", "e", "another token store"),
        ("zero_stage", 2, "engine.zero_stage=3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(checkpoints, tmp_path, key, value, words):
    other = Manifest(**{**vars(IDENTITY), key: value})
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path, CheckpointConfig(), other)


def test_the_manifest_records_the_step_and_the_hash_of_every_file(checkpoints):
    found = json.loads((checkpoints.folder / "step_15" / "manifest.json").read_text())
    assert (found["step"], found["rows_consumed"], found["world_size"]) == (15, 120, 1)
    assert found["files"].keys() == found["sha256"].keys() == {*SHARDS, "ode.pt"}
    assert found["versions"].keys() == {"clex-train", "python", "torch", "deepspeed", "transformers"}
    other = Manifest.from_config(Config(seed=1), architecture="a", data_fingerprint="d")
    assert len(found["config_hash"]) == 64
    assert found["config_hash"] != other.config_hash


def newest_config(run_dir: Path) -> Path | None:
    found = max(list_checkpoints(run_dir / "checkpoints")[0], key=lambda each: each.manifest.step, default=None)
    return found.config() if found else None


def test_each_checkpoint_has_its_configuration_and_a_damaged_copy_is_ignored(tmp_path):
    assert newest_config(tmp_path) is None
    for step in (5, 10):
        save_step(open_checkpoints(tmp_path, config=f"step: {step}\n"), step)
    copy = newest_config(tmp_path)
    assert copy == tmp_path / "checkpoints" / "step_10" / "config.yaml"
    assert copy.read_text() == "step: 10\n"
    copy.write_text("step: 12\n")
    assert newest_config(tmp_path) is None
    copy.unlink()
    assert newest_config(tmp_path).read_text() == "step: 5\n"


def test_weights_and_skipped_rows_may_change_only_ahead_of_a_checkpoint(tmp_path):
    def open_with(weight: float, skip: int) -> Checkpoints:
        order = {"weights": [[0, {"a": 1.0, "b": 2.0}], [50, {"a": weight, "b": 2.0}]], "skip_rows": [[skip, skip + 9]]}
        return Checkpoints(tmp_path, CheckpointConfig(overlap=False), replace(IDENTITY, data_order=order))

    open_with(3.0, 45).save(FileEngine(), None, step=5, rows_consumed=40)
    assert open_with(9.0, 40).newest() is not None
    open_with(3.0, 45).save(FileEngine(), None, step=6, rows_consumed=48)
    with pytest.raises(ValueError, match=r"^data.weights: checkpoint .*step_6 has read 48 rows under"):
        open_with(9.0, 45)
    with pytest.raises(ValueError, match=r"^data.skip_rows: checkpoint .*step_6 has read 48 rows under"):
        open_with(3.0, 47)
