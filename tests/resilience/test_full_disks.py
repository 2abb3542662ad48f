"""Export and report on full disks of twelve sizes: exit code 3, one line, no partial files, and success with room.

Training on such disks is tested in test_durable_runs.py and distributed/test_full_disk_runs.py.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import train
from clex_train.cli import export, report
from clex_train.console import program as console
from clex_train.report import write
from tests.helpers.composing import composed
from tests.helpers.full_disk import mounted, resize

SIZES = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def run(tiny_store: Path, tiny_architecture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a finished run with CLEX and two evaluations."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    overrides = (
        f"output_dir={folder}",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "model.context_len=32",
        "data.seq_len=32",
        # The exported layout is that of the original code, which knows only its recipe.
        "scaling=clex_paper",
        "scaling.t_max=4",
        "evaluation.every=2",
        "evaluation.lengths=[32,64]",
        "evaluation.methods=[trained]",
        "evaluation.num_windows=2",
        "optim.batch_rows=2",
        "optim.steps=4",
    )
    assert train.run(composed("+experiment=tiny_base", *overrides)) == 4
    return folder


def call(monkeypatch: pytest.MonkeyPatch, program: ModuleType, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    return console.run(program.main, program.usage)


@pytest.fixture
def draw_figures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each figure once: drawing is the slowest part here, and deterministic."""
    drawn, to_png = {}, write.to_png
    monkeypatch.setattr(
        write, "to_png", lambda figure: drawn.get(figure.name) or drawn.setdefault(figure.name, to_png(figure))
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, without the time and the command in a report."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "report.json" in files:
        said = json.loads(files["report.json"])
        for key in ("date", "command"):
            written = said.pop(key)
            files["index.html"] = files["index.html"].replace(written.encode(), b"")
        files["report.json"] = json.dumps(said).encode()
    return files


def count_full_disks(write: Callable[[Path], int], whole: Path, folder: Path, capsys: pytest.CaptureFixture) -> int:
    """Write on disks of twelve sizes up to that of the output, then with room; return the number of full ones."""
    assert write(whole) == 0, capsys.readouterr().err
    kib = sum(len(content) for content in contents(whole).values()) // 1024
    full = 0
    for index in range(SIZES):
        with mounted(folder / f"{index}", f"{max(4, kib * index // (SIZES - 2))}k") as disk:
            capsys.readouterr()
            code = write(disk / "output")
            if code != 0:
                said = capsys.readouterr().err.splitlines()
                assert code == console.STOPPED, said
                assert "Traceback" not in "".join(said)
                (line,) = (line for line in said if line.startswith("error: "))
                assert "No space left on device" in line
                assert str(disk) in line
                assert list(disk.iterdir()) == [], "nothing partial is left on a disk that needs room"
                resize(disk, "64m")
                assert write(disk / "output") == 0
                full += 1
            assert contents(disk / "output") == contents(whole)
            assert [entry.name for entry in disk.iterdir()] == ["output"]
    return full


def test_an_export_to_a_full_disk_fails_in_one_line_and_succeeds_with_room(run, tmp_path, monkeypatch, capsys):
    full = count_full_disks(
        lambda output: call(monkeypatch, export, f"run={run}", f"output={output}"), tmp_path / "whole", tmp_path, capsys
    )
    assert full >= SIZES - 3


@pytest.mark.usefixtures("draw_figures_once")
def test_a_report_on_a_full_disk_fails_in_one_line_and_succeeds_with_room(run, tmp_path, monkeypatch, capsys):
    full = count_full_disks(
        lambda output: call(monkeypatch, report, str(run), f"output={output}"), tmp_path / "whole", tmp_path, capsys
    )
    assert full >= SIZES - 3


@pytest.mark.usefixtures("draw_figures_once")
def test_a_report_without_room_leaves_the_earlier_one_unchanged(run, tmp_path, monkeypatch, capsys):
    with mounted(tmp_path / "disk", "64m") as disk:
        assert call(monkeypatch, report, str(run), f"output={disk / 'output'}") == 0
        (disk / "output" / "notes.txt").write_text("a user's own")
        before = contents(disk / "output")
        used = sum(len(content) for content in before.values()) // 1024
        resize(disk, f"{used + used // 2}k")
        assert call(monkeypatch, report, str(run), f"output={disk / 'output'}") == console.STOPPED
        assert contents(disk / "output") == before
        assert [path for path in (disk / "output").iterdir() if path.is_dir()] == []
