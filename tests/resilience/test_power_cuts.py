"""Power cuts on real file systems: copies of a mounted ext4 or xfs image, mounted as after a crash.

Data that the system has not yet written is not in the image; mounting a copy replays its journal.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clex_train.export.final import is_finished
from tests.helpers import environments

ROOT = Path(__file__).resolve().parents[2]
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image; skip the test if that is not permitted."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount an image on a loop device")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=False, capture_output=True)


@pytest.fixture(params=MAKE)
def image(request, tmp_path) -> Path:
    """Make an empty file system in a file."""
    if shutil.which(MAKE[request.param][0]) is None:
        pytest.skip(f"needs {MAKE[request.param][0]}")
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*MAKE[request.param], path], check=True, capture_output=True)
    return path


def cut(image: Path, number: int) -> Path:
    """Copy the present contents of the disk, as a sparse file."""
    copy = image.with_name(f"cut_{number}")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    return copy


@pytest.mark.slow
def test_a_run_resumes_bitwise_after_a_power_cut(image, tmp_path, tiny_store, tiny_architecture):
    arguments = (
        *("+experiment=tiny_base", f"data.path={tiny_store}", f"model.config={tiny_architecture}"),
        *("model.context_len=32", "data.seq_len=32", "evaluation.lengths=[32,64]", "evaluation.every=8"),
        *("evaluation.methods=[trained]", "evaluation.num_windows=2", "optim.batch_rows=2", "optim.steps=24"),
        "checkpoint.every=4",
    )
    disk = tmp_path / "disk"
    with mounted(image, disk):
        command = [sys.executable, "train.py", *arguments, f"output_dir={disk / 'run'}"]
        run = subprocess.Popen(command, cwd=ROOT, env=environments.launch_environment(), stderr=subprocess.DEVNULL)
        during, after = [], []
        while run.poll() is None:
            time.sleep(0.1)
            if any((disk / "run" / "checkpoints").glob("step_*")):
                during.append(cut(image, len(during)))
        assert run.returncode == 0
        for wait in (0, 1, 2, 5, 12):  # 20 s in total
            time.sleep(wait)
            after.append(cut(image, len(during) + len(after)))
        whole = {path.name: path.read_bytes() for path in (disk / "run" / "final").iterdir()}
        config = (disk / "run" / "config.yaml").read_bytes()
    for copy in after:
        with mounted(copy, disk):
            assert is_finished(disk / "run" / "final")
            assert {path.name: path.read_bytes() for path in (disk / "run" / "final").iterdir()} == whole
            assert (disk / "run" / "config.yaml").read_bytes() == config
    assert len(during) >= 5
    for copy in during[:: max(1, len(during) // 10)]:
        with mounted(copy, disk):
            # Run the program, since its environment decides what transformers writes to tokenizer_config.json.
            subprocess.run(
                command, cwd=ROOT, env=environments.launch_environment(), stderr=subprocess.DEVNULL, check=True
            )
            assert {path.name: path.read_bytes() for path in (disk / "run" / "final").iterdir()} == whole
            assert (disk / "run" / "config.yaml").read_bytes() == config
