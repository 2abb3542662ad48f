"""Resuming a run: bitwise equal on the same number of ranks, within rounding on another number."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.resuming import CELLS, figures
from tests.helpers.warm_processes import run_ranks

ELASTIC = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero2_adapter", "zero3_adapter")


@pytest.fixture(scope="module")
def resuming(tmp_path_factory, tiny_store, tiny_architecture):
    """Return a function that runs verbs of resuming.py in a folder on a number of ranks."""
    script = Path(__file__).with_name("resuming.py")

    def launch(folder: Path, ranks: int, verbs: str, *cells: str) -> Path:
        done = run_ranks(ranks, [str(script), str(folder), str(tiny_store), str(tiny_architecture), verbs, *cells])
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return launch


def losses(folder: Path) -> dict[str, float]:
    return {key: value for key, value in figures(folder).items() if key.endswith(" loss")}


def rows(folder: Path) -> dict[str, object]:
    return {key: value for key, value in figures(folder).items() if key.endswith((" rows", " t"))}


def assert_same_run(continued: Path, whole: Path) -> None:
    """Assert the same rows in the same order, losses within 1e-4 relative, weights within rounding of a few steps."""
    expected = losses(whole)
    assert losses(continued).keys() == expected.keys()
    assert losses(continued) == pytest.approx(expected, rel=1e-4)
    assert rows(continued) == rows(whole)
    one, two = (load_file(folder / "final" / "model.safetensors") for folder in (continued, whole))
    for name, weight in two.items():
        assert (one[name] - weight).abs().max() <= 1e-6 * weight.abs().max(), name


def test_a_run_on_one_rank_resumes_bitwise(resuming, tmp_path):
    folder = resuming(tmp_path, 1, "whole,part,exact", "zero3_accumulation_3")
    report = json.loads((folder / "zero3_accumulation_3.json").read_text())
    assert report["compared"] == 40
    assert report["different"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sequence_parallel_ranks_resume_bitwise_and_match_one_rank(resuming, tmp_path):
    folder = resuming(tmp_path, 2, "whole,part,exact", "rows_shared")
    report = json.loads((folder / "rows_shared.json").read_text())
    assert report["compared"] == 40
    assert report["different"] == []
    resuming(tmp_path, 1, "whole", "rows_alone")
    shared, alone = (figures(folder / f"{cell}_whole") for cell in ("rows_shared", "rows_alone"))
    assert shared.keys() == alone.keys()
    for key, value in alone.items():
        within = 1e-5 if key.endswith(" loss") or "perplexity" in key else 1e-3
        assert shared[key] == (value if key.endswith((" rows", " t")) else pytest.approx(value, rel=within)), key


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_accumulation_offload_and_dropout_resumes_bitwise(resuming, tmp_path, ranks):
    folder = resuming(tmp_path, ranks, "whole,part,exact", *CELLS)
    for cell in CELLS:
        assert json.loads((folder / f"{cell}.json").read_text())["different"] == [], cell


@pytest.fixture(scope="module")
def runs_of_two_ranks(resuming, tmp_path_factory) -> Path:
    return resuming(tmp_path_factory.mktemp("elastic"), 2, "whole,part", *ELASTIC)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_on_two_ranks_resumes_on_one_and_on_four(resuming, runs_of_two_ranks, ranks):
    resuming(runs_of_two_ranks, ranks, "resume", *ELASTIC)
    for cell in ELASTIC:
        continued = runs_of_two_ranks / f"{cell}_from2_to{ranks}"
        assert_same_run(continued, runs_of_two_ranks / f"{cell}_whole")
        assert {path.name for path in (continued / "checkpoints").iterdir()} == {
            "latest",
            *(f"step_{step}" for step in (2, 4, 6)),
        }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_on_one_rank_resumes_on_two(resuming, runs_of_two_ranks, tmp_path):
    folder = resuming(tmp_path, 1, "part", *ELASTIC)
    for cell in ELASTIC:
        shutil.copytree(runs_of_two_ranks / f"{cell}_whole", folder / f"{cell}_whole")
    resuming(folder, 2, "resume", *ELASTIC)
    for cell in ELASTIC:
        assert_same_run(folder / f"{cell}_from1_to2", folder / f"{cell}_whole")
