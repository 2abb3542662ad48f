"""Full disks of twelve sizes under two ranks: both exit with code 3 and one line, and resume once there is room."""

import shutil
from pathlib import Path

import pytest

from clex_train.console import program
from tests.distributed.distributed_runs import Launcher
from tests.helpers.full_disk import mounted, resize
from tests.helpers.same_models import assert_same_model

SIZES, RANKS = 12, 2
OVERRIDES = (
    "optim.steps=4",
    "optim.batch_rows=4",
    "engine.micro_batch=1",
    "checkpoint.every=2",
    "checkpoint.keep_last=1",
    "evaluation.every=2",
    "evaluation.lengths=[32,64]",
    "evaluation.num_windows=1",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def names(folder: Path) -> set[str]:
    every = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in every if not name.startswith(("environment_step_", "locks/"))}


@pytest.fixture(scope="module")
def whole(launcher: Launcher) -> Path:
    """Run with enough room."""
    done = launcher.run(RANKS, "with_room", *OVERRIDES)
    assert done.returncode == 0, done.stderr
    return launcher.folder / "with_room"


def run_on_small_disk(launcher: Launcher, whole: Path, disk: Path, on_full_disk: str) -> bool:
    """Run on a small disk, then with room; return True if the disk was full."""
    here = Launcher(disk, launcher.store, launcher.architecture)
    overrides = (*OVERRIDES, f"checkpoint.on_full_disk={on_full_disk}")
    ended = here.run_unsupervised(RANKS, "run", *overrides)
    said = "".join(done.stderr for done in ended)
    codes = [done.returncode for done in ended]
    assert "Traceback" not in said, said
    if is_full := codes != [0] * RANKS:
        assert codes == [program.STOPPED] * RANKS, said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "No space left on device" in line
        assert str(disk) in line
        assert line.endswith("make room and run the same command again")
        partial = [name for name in names(disk) if name.endswith(".tmp") or "saving_" in name or "removing_" in name]
        assert partial == []
        resize(disk, "64m")
        again = here.run(RANKS, "run", *overrides)
        assert again.returncode == 0, again.stderr
    assert_same_model(whole / "final", disk / "run" / "final")
    if on_full_disk == "stop":
        assert names(disk / "run") == names(whole)
        assert here.figures("run", "loss") == launcher.figures("with_room", "loss")
    return is_full


@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_two_ranks_lose_nothing_on_full_disks_of_twelve_sizes(launcher, whole, tmp_path, on_full_disk):
    kib = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    full = []
    for index in range(SIZES):
        with mounted(tmp_path / "disk", f"{16 + index * kib // 10}k") as disk:
            full.append(run_on_small_disk(launcher, whole, disk, on_full_disk))
        shutil.rmtree(tmp_path / "disk")
        print(f"{on_full_disk}, {16 + index * kib // 10} KiB: {'full' if full[-1] else 'had room'}")
    assert full[0]
    assert sum(full) >= 5, "with `continue`, a disk without room for a checkpoint may have room for the final model"
