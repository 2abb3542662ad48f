"""A checkpoint is complete or it is not there: what a kill or a fault leaves behind is passed over, never loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clex_train.checkpoint import Checkpoints, Manifest
from clex_train.config import Config
from clex_train.faults import RunStopped

IDENTITY = Manifest.of_run(Config(), architecture="a", data_fingerprint="d")


class FileEngine:
    """Stands where DeepSpeed's engine does and writes one file; `content` is what a shard would hold."""

    def __init__(self, content: bytes = b"weights" * 100, error: Exception | None = None) -> None:
        self.content, self.error, self.loaded = content, error, None

    def save_checkpoint(self, folder, tag, save_latest):
        assert not save_latest
        (Path(folder) / tag / "shard.pt").write_bytes(self.content)
        if self.error:
            raise self.error

    def load_checkpoint(self, folder, tag):
        self.loaded = (Path(folder) / tag / "shard.pt").read_bytes()
        return tag, {}


def steps_on_disk(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.folder.glob("step_*"))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    found = Checkpoints(tmp_path, keep_last=2, identity=IDENTITY)
    for step in (5, 10, 15):
        found.save(FileEngine(f"weights of {step}".encode()), {"x": 1}, step, rows_consumed=step * 8)
    return found


def test_the_newest_are_kept_and_the_last_is_loaded(checkpoints):
    assert steps_on_disk(checkpoints) == [10, 15]
    assert (checkpoints.folder / "latest").read_text() == "step_15\n"
    engine = FileEngine()
    assert checkpoints.load(engine) == (15, {"x": 1})
    assert engine.loaded == b"weights of 15"


@pytest.mark.parametrize("name", ["shard.pt", "ode.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_damaged_newest_one_gives_way_to_the_one_before(checkpoints, name, damage):
    path = checkpoints.folder / "step_15" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "truncated" else path.read_bytes() + b"}{")
    engine = FileEngine()
    step, _ = checkpoints.load(engine)
    assert step == 10
    assert engine.loaded == b"weights of 10"


def test_what_a_kill_leaves_while_saving_is_ignored_and_cleared(checkpoints):
    shutil.copytree(checkpoints.folder / "step_15", checkpoints.folder / "saving_step_20")
    (checkpoints.folder / "step_25").mkdir()
    assert checkpoints.newest()[1].step == 15
    checkpoints.save(FileEngine(), None, 20, rows_consumed=160)
    assert checkpoints.newest()[1].step == 20
    assert not list(checkpoints.folder.glob("saving_*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_save_names_the_folder_and_leaves_the_others(checkpoints, error):
    with pytest.raises(RunStopped, match=r"saving_step_20: cannot be written .*earlier ones are intact"):
        checkpoints.save(FileEngine(error=error), None, 20, rows_consumed=160)
    assert checkpoints.newest()[1].step == 15
    assert (checkpoints.folder / "latest").read_text() == "step_15\n"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("architecture", "b", "another architecture"),
        ("data_fingerprint", "e", "another token store"),
        ("world_size", 2, "written by 1 ranks"),
        ("zero_stage", 2, "engine.zero_stage=3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(checkpoints, tmp_path, key, value, words):
    other = Manifest(**{**vars(IDENTITY), key: value})
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path, keep_last=2, identity=other)


def test_the_manifest_counts_rows_and_names_every_file(checkpoints):
    manifest = json.loads((checkpoints.folder / "step_15" / "manifest.json").read_text())
    assert manifest["rows_consumed"] == 120
    assert manifest["files"].keys() == {"shard.pt", "ode.pt"}


def test_weights_and_skipped_rows_may_change_only_ahead_of_a_checkpoint(tmp_path):
    def identity(weight: float, skip: int) -> Manifest:
        order = {"weights": [[0, {"a": 1.0, "b": 2.0}], [50, {"a": weight, "b": 2.0}]], "skip_rows": [[skip, skip + 9]]}
        return replace(IDENTITY, data_order=order)

    Checkpoints(tmp_path, 2, identity(3.0, 45)).save(FileEngine(), None, step=5, rows_consumed=40)
    assert Checkpoints(tmp_path, 2, identity(9.0, 40)).newest() is not None
    Checkpoints(tmp_path, 2, identity(3.0, 45)).save(FileEngine(), None, step=6, rows_consumed=48)
    with pytest.raises(ValueError, match=r"^data.weights: checkpoint .*step_6 has read 48 rows under"):
        Checkpoints(tmp_path, 2, identity(9.0, 45))
    with pytest.raises(ValueError, match=r"^data.skip_rows: checkpoint .*step_6 has read 48 rows under"):
        Checkpoints(tmp_path, 2, identity(3.0, 47))
