"""Inputs of the report program: runs and evaluation files, labels, and one-line refusals."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from clex_train.cli import report as program
from clex_train.console import program as console
from clex_train.evaluation import results
from clex_train.report import evidence, page, write
from clex_train.utils.errors import InputError
from tests.report.evaluation_files import ORIGIN, add_to_file, make_run, outcome, relabelled, task_row


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    base = make_run(tmp_path / "runs" / "base", {"none": [35, 60, 900], "ntk": [35, 34, 50]}, learned=False)
    clex = make_run(tmp_path / "runs" / "clex", {"trained": [34, 33, 36]}, learned=True)
    return {"base": base, "clex": clex}


@pytest.fixture
def _skip_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each figure by an empty image, for tests that only read files and text."""
    monkeypatch.setattr(write, "to_png", lambda figure: b"")
    monkeypatch.setattr(page, "to_svg", lambda figure: "<svg></svg>")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return console.run(program.main, program.usage)


def test_several_runs_share_a_table_with_the_run_in_each_label(runs: dict[str, Path]) -> None:
    found = evidence.collect(list(runs.values()))
    [table] = found.tables
    assert [curve.label for curve in table.curves] == ["base: none", "base: ntk", "clex: trained"]
    assert [run.label for run in found.runs] == ["base", "clex"]
    assert len(found.runs[0].metrics) == 40
    assert found.runs[0].frequencies is None
    assert found.runs[1].frequencies is not None


def test_one_run_has_its_methods_as_labels_and_its_report_in_its_folder(runs, monkeypatch, capsys) -> None:
    assert call(monkeypatch, runs["base"]) == 0
    printed = capsys.readouterr().out
    assert "\nntk " in printed
    assert str(runs["base"] / "report" / "index.html") in printed
    names = {path.name for path in (runs["base"] / "report").iterdir()}
    figures = {"perplexity.png", "perplexity_enlarged.png", "loss.png", "throughput.png"}
    assert names >= {"index.html", "perplexity.md", "report.json"} | (figures - {"perplexity_enlarged.png"})


def test_a_run_means_its_newest_evaluation_and_a_file_itself(runs: dict[str, Path]) -> None:
    older = runs["base"] / "evaluation" / "step_20.json"
    results.write(older, outcome({"none": [70, 80, 90]}), ORIGIN)
    os.utime(older, (1, 1))
    assert evidence.find_evaluation(runs["base"]).name == "base.json"
    assert evidence.find_evaluation(older) == older


def test_equal_labels_are_distinguished_by_a_minimal_part_of_the_path(tmp_path: Path) -> None:
    made = [
        make_run(tmp_path / seed / "tiny", {"none": [p, 4, 5]}, learned=False)
        for seed, p in (("seed0", 3.0), ("seed1", 3.5))
    ]
    found = evidence.collect(made)
    assert [curve.label for curve in found.tables[0].curves] == ["seed0/tiny: none", "seed1/tiny: none"]
    assert [run.label for run in found.runs] == ["seed0/tiny", "seed1/tiny"]


def test_evaluations_of_one_run_are_distinguished_by_file_name(runs: dict[str, Path]) -> None:
    more = runs["base"] / "evaluation" / "more.json"
    results.write(more, outcome({"pi": [3, 4, 5]}), relabelled("base"))
    found = evidence.collect([runs["base"] / "evaluation" / "base.json", more])
    assert [curve.label for curve in found.tables[0].curves] == ["base: none", "base: ntk", "base/more: pi"]
    assert [run.label for run in found.runs] == ["base"]


def test_a_run_named_twice_is_shown_once(runs: dict[str, Path]) -> None:
    found = evidence.collect([runs["base"], runs["base"] / "evaluation" / "base.json"])
    assert [curve.label for curve in found.tables[0].curves] == ["none", "ntk"]


def test_retrieval_is_grouped_by_task_and_method(runs: dict[str, Path]) -> None:
    path = runs["base"] / "evaluation" / "base.json"
    add_to_file(path, tasks=[task_row("none", 256, depth, 5) for depth in (0.0, 1.0)] + [task_row("ntk", 256, 0.5, 9)])
    assert [(t.label, t.task, len(t.rows)) for t in evidence.collect([path]).tasks] == [
        ("none", "passkey", 2),
        ("ntk", "passkey", 1),
    ]


def test_a_report_of_retrieval_alone_has_no_perplexities(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "evaluation" / "x.json"
    results.write(path, results.Results([], 128, results.NO_WINDOWS), ORIGIN)
    add_to_file(path, tasks=[task_row("none", 256, depth, 5) for depth in (0.0, 1.0)])
    assert call(monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/report/index.html\n"
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [figure["file"] for figure in content["figures"]] == ["retrieval_passkey.png"]
    assert content["tasks"][0]["source"]["weights"] == "runs/base/final, hash ab12"
    assert "Perplexity against length" in [each["title"] for each in content["not_shown"]]


def test_a_partly_written_line_of_metrics_is_ignored(runs: dict[str, Path]) -> None:
    with (runs["base"] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert len(evidence.collect([runs["base"]]).runs[0].metrics) == 40


def test_non_finite_values_are_omitted_from_a_column(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"none": [3, 4, 5]}, learned=False)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 4.5}\n')
    [found] = evidence.collect([run]).runs
    steps, losses = found.column("loss")
    assert (steps.tolist(), losses.tolist()) == ([2], [4.5])


@pytest.mark.usefixtures("_skip_drawing")
def test_damaged_training_records_are_omitted_with_a_line_each(runs, tmp_path, monkeypatch, caplog):
    run = make_run(tmp_path / "spoilt", {"none": [3, 4, 5]}, learned=False)
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, \n\xff\0\n{"step": 2, "loss": 4.5}\n{"step": 3, "lo')
    (run / "environment.json").write_bytes(bytes(200))
    assert call(monkeypatch, run, f"output={tmp_path / 'out'}") == 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(line.removeprefix(f"{run}/") for line in said if "spoilt" in line) == [
        "environment.json: damaged, its contents are left out",
        "metrics.jsonl: lines that cannot be read are left out: 2",
    ]
    (found,) = evidence.find_runs([run / "evaluation" / "spoilt.json"])
    assert found.column("loss")[1].tolist() == [4.5]


def test_a_log_larger_than_the_disk_is_read_up_to_a_bound(tmp_path, caplog) -> None:
    run = make_run(tmp_path / "run", {"none": [3, 4, 5]}, learned=False)
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 4.5}\n')
    os.truncate(run / "metrics.jsonl", 2**40)
    assert evidence.collect([run]).runs[0].column("loss")[1].tolist() == [4.5]
    assert f"{run}/metrics.jsonl: more than 256 MiB of it cannot be read; the rest is left out" in caplog.text


@pytest.mark.parametrize("windows", [{}, {"count": 3}, {"count": "3", "length": 64}, {"count": 3, "length": -1}, []])
def test_an_evaluation_whose_windows_lack_a_field_is_refused_by_its_file(tmp_path, windows) -> None:
    run = make_run(tmp_path / "run", {"none": [3, 4, 5]}, learned=False)
    [path] = (run / "evaluation").glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "windows": windows}))
    with pytest.raises(InputError, match=str(path)):
        results.read(path)


@pytest.mark.usefixtures("_skip_drawing")
def test_unusable_inputs_are_named_with_a_remedy(runs, tmp_path, monkeypatch, capsys) -> None:
    unfinished = make_run(tmp_path / "unfinished", {"none": [3, 4, 5]}, learned=False)
    (unfinished / "final" / "config.json").unlink()
    (unfinished / "final").rmdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.json").write_text("{")
    damaged = make_run(tmp_path / "damaged", {"none": [3, 4, 5]}, learned=False)
    add_to_file(damaged / "evaluation" / "damaged.json", tasks=[{"task": "passkey"}])
    expected = {
        tmp_path / "nowhere": "no such run folder or evaluation file; give the output_dir of a run",
        unfinished: f"not finished (no final/); start the same training command again, it continues, or name one of "
        f"its evaluations: {unfinished}/evaluation/unfinished.json",
        empty: f"no evaluation in it; run python -m clex_train.cli.evaluate run={empty} first",
        tmp_path / "bad.json": "cannot be read as an evaluation",
        damaged: "damaged or of another version",
    }
    for path, message in expected.items():
        assert call(monkeypatch, runs["base"], path, f"output={tmp_path / 'out'}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"error: {path}")
        assert message in error
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, unfinished / "evaluation" / "unfinished.json", f"output={tmp_path / 'out'}") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "runs=[]: name one or more run folders or evaluation files"),
        (("a", "out=b"), "out: no such key; did you mean output?"),
    ],
)
def test_a_command_line_without_runs_or_with_an_unknown_key_is_refused(
    arguments: tuple[str, ...], message: str, monkeypatch, capsys
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_in_one_line(runs, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "deep"):
        assert call(monkeypatch, runs["base"], f"output={output}") == console.USER_ERROR
        said = f"error: output={output}: {tmp_path / 'file'} is a file, not a folder; name another place\n"
        assert capsys.readouterr().err == said
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("_skip_drawing")
@pytest.mark.parametrize("name", ["perplexity.png", "perplexity.md", "report.json", "index.html"])
def test_an_unwritable_file_is_named_in_one_line_and_kept(name, runs, tmp_path, monkeypatch, capsys) -> None:
    out, replace = tmp_path / "out", os.replace
    assert call(monkeypatch, runs["base"], f"output={out}") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fill_up(path: str, target: Path) -> None:
        if target.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, target)

    monkeypatch.setattr(os, "replace", fill_up)
    capsys.readouterr()
    assert call(monkeypatch, runs["base"], f"output={out}") == console.STOPPED
    said = f"error: output={out / name}: cannot be written (No space left on device); make room or name another folder"
    assert capsys.readouterr().err == f"{said}, and report again\n"
    assert {path.name for path in out.iterdir()} == before.keys()
    assert (out / name).read_bytes() == before[name]


@pytest.mark.usefixtures("_skip_drawing")
def test_a_folder_at_the_path_of_the_page_is_named_in_one_line(runs, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    assert call(monkeypatch, runs["base"], f"output={tmp_path / 'out'}") == console.STOPPED
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: output={tmp_path / 'out' / 'index.html'}: cannot be written (Is a directory); ")


@pytest.mark.usefixtures("_skip_drawing")
def test_a_second_report_removes_stale_figures(runs, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, runs["clex"], f"output={out}") == 0
    assert (out / "frequencies.png").exists()
    (out / "mine.png").write_bytes(b"kept")
    assert call(monkeypatch, runs["base"], f"output={out}") == 0
    assert not (out / "frequencies.png").exists()
    assert (out / "mine.png").exists()
    (out / "report.json").write_text("{")
    assert call(monkeypatch, runs["base"], f"output={out}") == 0


@pytest.mark.usefixtures("_skip_drawing")
def test_every_row_and_figure_of_the_json_has_command_weights_data_commit_and_hardware(runs, tmp_path, monkeypatch):
    assert call(monkeypatch, *runs.values(), f"output={tmp_path}") == 0
    content = json.loads((tmp_path / "report.json").read_text())
    rows = [row for table in content["tables"] for row in table["rows"]]
    assert [row["perplexity"]["2048"] for row in rows] == pytest.approx([900, 50, 36])
    assert [row["fingerprint"]["128"] for row in rows] == ["f"] * 3
    sources = [row["source"] for row in rows] + [s for figure in content["figures"] for s in figure["sources"]]
    for source in sources:
        assert {"command", "weights", "data", "commit", "hardware"} <= source.keys()
        assert source["commit"] == "c0ffee"
    assert rows[0]["source"]["weights"] == "runs/base/final, hash ab12"
    assert {figure["file"] for figure in content["figures"]} <= {path.name for path in tmp_path.iterdir()}


def test_weights_of_the_last_step_are_named_by_the_hash_of_final(tmp_path: Path) -> None:
    from clex_train.report.evidence import evaluation_source

    run = make_run(tmp_path / "run", {"none": [3, 4, 5]}, learned=False)
    path = run / "evaluation" / "step_40.json"
    for step in (40, 20):
        origin = results.Origin("run", ["train.py"], {"path": str(run), "step": step}, {}, {})
        results.write(path, outcome({"none": [3, 4, 5]}), origin)
        [found] = evidence.collect([path]).runs
        known = found.final_hash if step == 40 else "not recorded"
        assert dict(evaluation_source(path, origin, [found]).facts)["weights"] == f"{run}, step {step}, hash {known}"
    assert found.final_hash is not None
