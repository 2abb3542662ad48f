"""SIGKILL at every call that changes a file: repeating the command gives the same bits and leaves nothing behind.

CRASH_EVERY=10 python -m pytest -m slow -s tests/resilience/test_crash_points.py
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.resilience.crashing import SCRIPT, Contents, Crashing, CrashingWorker

ROOT = Path(__file__).resolve().parents[2]
EVERY = int(os.environ.get("CRASH_EVERY", "1"))
STRICT_EVERY = 5
UNLIKE = ("step_seconds", "tokens_per_second", "seconds", "memory_gib", "mfu", "git_commit", "command")
"""Keys of records that may differ between two launches of one command in one checkout."""


def comparable_files(place: Path) -> Contents:
    """Return every path with its comparable part, except the environment files that a resumed launch adds."""
    paths = [path for path in place.rglob("*") if not path.name.startswith("environment_step_")]
    return {str(path.relative_to(place)): _comparable_part(path) for path in paths}


def _comparable_part(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [_comparable(row) for row in map(json.loads, path.open()) if "save_seconds" not in row]
    if path.parent.name == "evaluation":
        return _comparable(json.loads(path.read_text()))
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("resume:")]
    if path.name == "manifest.json":
        # The copy of the configuration has another `resume` after a strict launch.
        return json.loads(path.read_text())["sha256"] | {"config.yaml": ""}
    if path.is_file() and (path.parent.name == "final" or path.name == "latest"):
        return path.read_bytes()
    return path.is_file()


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items() if key not in UNLIKE}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


def every_byte(place: Path) -> Contents:
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


@pytest.fixture
def training(tmp_path, tiny_store, tiny_architecture) -> Crashing:
    """Configure four steps with two checkpoints, keeping one, two evaluations and a final CLEX model."""
    place = tmp_path / "place"
    command = [
        *("train.py", "+experiment=tiny_base", f"output_dir={place / 'run'}", f"data.path={tiny_store}"),
        *(f"model.config={tiny_architecture}", "model.context_len=32", "data.seq_len=32", "optim.batch_rows=2"),
        *("scaling=clex", "scaling.t_max=4", "optim.steps=4", "checkpoint.every=2", "checkpoint.keep_last=1"),
        *("evaluation.every=2", "evaluation.lengths=[32,64]", "evaluation.methods=[trained]"),
        *("evaluation.num_windows=1", "tracking.wandb=off"),
    ]
    return Crashing(command, place, comparable_files)


@pytest.fixture
def tokenizing(tmp_path, tiny_store) -> Callable[..., Crashing]:
    """Return a function for `data_prep tokenize` with held-out documents; two shards for `shard_mb=1`."""
    texts, place = tmp_path / "texts.jsonl", tmp_path / "place"
    lines = [json.dumps({"text": f"{row} the clocks were striking thirteen " * 60}) for row in range(500)]
    texts.write_text("\n".join(lines))
    command = [
        *("-m", "data_prep", "tokenize", f"output={place / 'store'}", "corpus.name=tiny"),
        *(f"corpus.paths=[{texts}]", f"tokenizer={tiny_store / 'tokenizer'}", "corpus.validation_share=0.2"),
    ]
    return lambda *overrides, kind=Crashing: kind([*command, *overrides], place, every_byte)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_killed_at_any_crash_point_resumes_bitwise_and_strict_finds_no_damage(training):
    training.check_all(EVERY, STRICT_EVERY)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [1, 2])
def test_tokenize_killed_at_any_crash_point_ends_with_the_same_bytes(tokenizing, workers):
    tokenizing("shard_mb=1", f"workers={workers}").check_all(EVERY)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_tokenize_with_a_worker_killed_at_any_crash_point_ends_with_the_same_bytes(tokenizing):
    tokenizing("shard_mb=1", "workers=2", kind=CrashingWorker).check_all(EVERY)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_tokenize_killed_while_replacing_a_store_ends_with_the_same_bytes(tokenizing, tiny_store):
    program = tokenizing("overwrite=true")
    program.prepare = lambda: shutil.copytree(tiny_store, program.place / "store")
    program.check_all(EVERY)


WRITER = """
import sys
from pathlib import Path
from clex_train.utils import files

place = Path(sys.argv[1])
files.write_atomically(place / "record", "new" * 1000)
with files.atomic_directory(place / "model") as folder:
    (folder / "weights").write_bytes(b"new" * 1000)
"""
OLD, NEW = b"old" * 500, b"new" * 1000


def _write(program: Path, place: Path, at: int) -> subprocess.CompletedProcess[str]:
    variables = {"CRASH_ROOT": str(place), "CRASH_LOG": str(place.with_suffix(".log")), "CRASH_AT": str(at)}
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, str(program), str(place)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _write_old(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    (place / "model").mkdir(parents=True)
    for name in ("record", "model/weights"):
        (place / name).write_bytes(OLD)


def test_files_and_folders_are_old_or_new_after_a_kill_at_any_point(tmp_path):
    from clex_train.utils import files

    program, place = tmp_path / "writer.py", tmp_path / "place"
    program.write_text(WRITER)
    _write_old(place)
    assert _write(program, place, 0).returncode == 0
    points = [line.split()[1:] for line in place.with_suffix(".log").read_text().splitlines()]
    assert points[:5] == [
        *(["open", "record.tmp"], ["opened", "record.tmp"], ["half", "record.tmp"], ["fsync", "record.tmp"]),
        ["os.rename", "record.tmp", "record"],
    ]
    seen = set()
    for at in (3, 5, *range(7, len(points) + 1, 2)):
        _write_old(place)
        assert _write(program, place, at).returncode == -9
        leftover = (place / "record.tmp").stat().st_size if (place / "record.tmp").exists() else None
        assert leftover == {3: 1500, 5: 3000}.get(at)
        files.recover(place / "model")
        state = (place / "record").read_bytes(), (place / "model" / "weights").read_bytes()
        assert {path.name for path in place.iterdir()} - {"record.tmp"} == {"record", "model"}, points[at - 1]
        seen.add(state)
    assert seen == {(OLD, OLD), (NEW, OLD), (NEW, NEW)}
