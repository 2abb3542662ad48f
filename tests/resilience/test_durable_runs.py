"""Damaged files, leftovers of kills and full disks in a run folder, through train.py in this process."""

import json
import shutil
from pathlib import Path

import pytest

import train
from clex_train.console import program
from clex_train.utils import checksums
from clex_train.utils.errors import RunStopped
from tests.helpers.composing import composed
from tests.helpers.full_disk import mounted, resize


@pytest.fixture(scope="module")
def arguments(tiny_store, tiny_architecture):
    return (
        "+experiment=tiny_base",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "model.context_len=32",
        "data.seq_len=32",
        "evaluation.every=2",
        "evaluation.lengths=[32,64]",
        "evaluation.methods=[trained]",
        "evaluation.num_windows=2",
        "optim.batch_rows=2",
        "optim.steps=4",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
    )


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """Run four steps, with evaluations at the second and the last and a checkpoint of the last."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.run(composed(*arguments, f"output_dir={folder}")) == 4
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def start(arguments, folder: Path, *overrides: str) -> int:
    return train.run(composed(*arguments, f"output_dir={folder}", *overrides))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"locks/rank_0"}


def final(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "final").iterdir()}


def steps(folder: Path) -> list[tuple[int, bool]]:
    """Return (step, is it an evaluation) of each line of metrics.jsonl, without those of durations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], "loss" not in row) for row in rows if "save_seconds" not in row]


def warnings(caplog) -> list[str]:
    own = (record for record in caplog.records if record.name.startswith("clex_train"))
    return [record.message for record in own if record.levelname == "WARNING"]


def test_a_run_folder_has_exactly_the_documented_files(finished):
    assert {entry.name for entry in finished.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl"),
        *("checkpoints", "evaluation", "final", "locks"),
    }
    assert {entry.name for entry in (finished / "checkpoints").iterdir()} == {"latest", "step_4"}
    kept = finished / "checkpoints" / "step_4" / "config.yaml"
    assert kept.read_text() == (finished / "config.yaml").read_text()
    checksums.require_contents(finished / "final")
    assert steps(finished) == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_relaunching_a_finished_run_removes_leftovers_which_strict_does_not_count_as_damage(
    arguments, run, finished, caplog
):
    checkpoints = run / "checkpoints"
    for name in ("saving_step_8", "removing_step_1", "universal", "converting_universal"):
        shutil.copytree(checkpoints / "step_4", checkpoints / name)
    shutil.copytree(checkpoints / "step_4", checkpoints / "step_2")
    _set_step_2(checkpoints / "step_2")
    (checkpoints / "latest").write_text("step_2\n")
    for name in ("saving_final", "replaced_final", "removing_final"):
        shutil.copytree(run / "final", run / name)
    for name in (".writable_node_7", "config.yaml.tmp", "metrics.jsonl.tmp", "evaluation/step_2.json.tmp"):
        (run / name).write_text("half")
    (run / "notes.tmp").write_text("a user's own")
    assert start(arguments, run, "resume=strict") == 4
    assert names(run) - names(finished) == {"notes.tmp"}
    assert names(finished) <= names(run)
    assert (checkpoints / "latest").read_text() == "step_4\n"
    assert not warnings(caplog)


def _set_step_2(folder: Path) -> None:
    from clex_train.checkpoint.manifest import Manifest

    said = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(Manifest(**{**said, "step": 2}).render())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", "zeros"),
        ("config.json", "empty"),
        ("tokenizer.json", "missing"),
        (checksums.NAME, "empty"),
    ],
)
def test_a_damaged_final_model_is_named_and_rewritten_from_the_checkpoint(
    arguments, run, finished, caplog, name, content
):
    path = run / "final" / name
    if content == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size if content == "zeros" else 0))
    assert start(arguments, run) == 4
    (said,) = warnings(caplog)
    assert said.startswith(f"{run / 'final'} is damaged: {name} ")
    assert said.endswith("rewriting it from the last checkpoint")
    assert final(run) == final(finished)
    assert names(run) == names(finished) | {"environment_step_4.json"}
    assert steps(run) == steps(finished)


def test_damaged_records_are_moved_or_restored_with_a_line_each_and_the_run_continues(arguments, run, finished, caplog):
    shutil.rmtree(run / "final")
    log = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\xff{]\n" + log + b'{"st')
    (run / "environment.json").write_bytes(b"\0" * 300)
    (run / "config.yaml").write_bytes(b"")
    assert start(arguments, run) == 4
    said = warnings(caplog)
    assert len(said) == 3
    for name in ("metrics.jsonl", "environment.json", "config.yaml"):
        assert sum(str(run / name) in line for line in said) == 1
        assert (run / f"{name}.damaged").exists()
    assert (run / "config.yaml").read_text() == (finished / "config.yaml").read_text().replace(str(finished), str(run))
    assert (run / "metrics.jsonl").read_bytes() == log
    assert final(run) == final(finished)


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"optim:\n\tlr: 1", b"name: \xff", b"[1]", b"just text", b"- a"])
def test_a_damaged_configuration_of_a_finished_run_is_restored_from_its_checkpoint(arguments, run, content):
    (run / "config.yaml").write_bytes(content)
    start(arguments, run)
    assert (run / "config.yaml").read_bytes() == (run / "checkpoints" / "step_4" / "config.yaml").read_bytes()
    assert (run / "config.yaml.damaged").read_bytes() == content


def test_a_changed_configuration_is_still_refused_with_a_damaged_file(arguments, run):
    (run / "config.yaml").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^seed: differs from .*config\.yaml"):
        start(arguments, run, "seed=5")


def test_a_damaged_configuration_without_a_copy_is_named_with_a_remedy(arguments, run):
    from clex_train.checkpoint.manifest import Manifest

    folder = run / "checkpoints" / "step_4"
    said = json.loads((folder / "manifest.json").read_text())
    for group in ("files", "sha256"):
        del said[group]["config.yaml"]
    (folder / "config.yaml").unlink()
    (folder / "manifest.json").write_text(Manifest(**said).render())
    (run / "config.yaml").write_bytes(b"\0" * 500)
    with pytest.raises(
        ValueError, match=r"config\.yaml: damaged, cannot be read.*restore a backup, or remove"
    ) as refused:
        start(arguments, run)
    assert program.report(refused.value) == program.USER_ERROR


def _error_of(arguments, disk: Path, on_full_disk: str) -> Exception | None:
    """Run on a small disk; return the error that ended it, or None; check that no partial file is left."""
    error = None
    try:
        start(arguments, disk / "run", f"checkpoint.on_full_disk={on_full_disk}")
    except (RunStopped, OSError) as caught:
        error = caught
    left = names(disk / "run") if (disk / "run").exists() else set()
    assert not [name for name in left if "saving_" in name or "removing_" in name or name.endswith(".tmp")], left
    return error


def _run_on_small_disk(arguments, finished, folder: Path, size: int, on_full_disk: str) -> bool:
    """Run on a disk of `size` KiB, then with room; return True if the disk was full."""
    with mounted(folder, f"{size}k") as disk:
        error = _error_of(arguments, disk, on_full_disk)
        if error is not None:
            line, code = program._classify(error)
            assert (code, line.count("\n")) == (program.STOPPED, 0)
            assert str(disk) in line
            assert "No space left on device" in line
            assert line.endswith("make room and run the same command again")
            resize(disk, "64m")
            assert _error_of(arguments, disk, on_full_disk) is None
        assert final(disk / "run") == final(finished)
        if on_full_disk == "stop":
            assert steps(disk / "run") == steps(finished)
    return error is not None


def _size_in_kib(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024


@pytest.mark.parametrize(("part", "on_full_disk"), [(0.5, "stop"), (1.0, "stop"), (1.0, "continue")])
def test_a_full_disk_stops_a_run_in_one_line_and_it_resumes_bitwise_with_room(
    arguments, finished, tmp_path, part, on_full_disk
):
    # A new checkpoint or final model is written before the old one is removed.
    size = int(part * _size_in_kib(finished))
    assert _run_on_small_disk(arguments, finished, tmp_path / "disk", size, on_full_disk)


@pytest.mark.slow
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_disk_that_fills_at_any_of_twelve_moments_costs_nothing(arguments, finished, tmp_path, on_full_disk):
    sizes = [16 + index * _size_in_kib(finished) // 10 for index in range(12)]
    full = [_run_on_small_disk(arguments, finished, tmp_path / f"{size}", size, on_full_disk) for size in sizes]
    assert full[0]
    assert sum(full) >= 5, "with `continue`, a disk without room for a checkpoint may have room for the final model"
