"""Stop requests in the training loop, on one process with the real engine: saving, messages and resuming."""

import json
from pathlib import Path

import pytest

import train
from clex_train.console import program
from clex_train.evaluation import runner
from clex_train.resilience import stop_requests
from clex_train.resilience.deadline import Deadline
from clex_train.training import loop
from clex_train.utils.errors import RunStopped, StopRequested
from tests.helpers.same_models import assert_same_model


@pytest.fixture
def run(tmp_path, tiny_run, monkeypatch):
    """Return a function that runs train.run on a tiny model, in a folder of the test."""
    monkeypatch.setattr(stop_requests, "POLL_SECONDS", 0.0)

    def start(name: str, *overrides: str) -> Path:
        evaluation = ("evaluation.methods=[trained]", "evaluation.num_windows=2")
        length = ("optim.batch_rows=2", "optim.steps=6")
        train.run(tiny_run(tmp_path / name, "scaling=clex", *evaluation, *length, *overrides))
        return tmp_path / name

    start.folder = tmp_path
    return start


def touch_at_call(monkeypatch, module, name: str, calls: int, stop_file: Path) -> None:
    """Create a stop file at the given call of a function of `module`."""
    function, taken = getattr(module, name), [0]

    def counted(*arguments, **named):
        taken[0] += 1
        if taken[0] == calls:
            stop_file.touch()
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, counted)


def metrics(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "save_seconds" not in line]


def test_a_stop_file_saves_the_step_and_the_run_resumes_bitwise(run, monkeypatch, capsys):
    whole = run("whole")
    with monkeypatch.context() as patched:
        touch_at_call(patched, loop, "forward_backward", 3, run.folder / "stopped" / "stop")
        with pytest.raises(StopRequested, match=r"after step 3: .*stop exists .*step_3; the same command") as asked:
            run("stopped")
    assert program.report(asked.value) == program.RESUMABLE == 75
    assert "stopped after step 3" in capsys.readouterr().err
    stopped = run("stopped")
    assert not (stopped / "stop").exists()
    assert_same_model(whole / "final", stopped / "final")
    assert [row.get("rows") for row in metrics(stopped)] == [row.get("rows") for row in metrics(whole)]
    assert [row["rows"] for row in metrics(whole)[:6]] == [[[2 * step, 2 * step + 1]] for step in range(6)]


def test_an_evaluation_is_interrupted_between_windows_and_repeated(run, monkeypatch):
    with monkeypatch.context() as patched:
        touch_at_call(patched, runner, "rank_batches", 2, run.folder / "run" / "stop")
        with pytest.raises(StopRequested, match=r"after step 4: .*step_4"):
            run("run", "evaluation.every=4")
    assert not [row for row in metrics(run.folder / "run") if any(key.startswith("perplexity") for key in row)]
    assert not list((run.folder / "run").glob("evaluation/*.json"))
    folder = run("run", "evaluation.every=4")
    scored = [row["step"] for row in metrics(folder) if "perplexity/trained/one_shot/64" in row]
    assert scored == [4, 6]


def test_a_run_stopped_while_loading_takes_no_step(run, monkeypatch):
    from clex_train.models import load

    touch_at_call(monkeypatch, load, "load_for_training", 1, run.folder / "run" / "stop")
    with pytest.raises(StopRequested, match=r"after step 0: .*there is no checkpoint yet"):
        run("run")


def test_a_max_runtime_too_short_for_one_step_is_an_error_and_not_resumable(run):
    with pytest.raises(RunStopped, match=r"max_runtime ends in 0 s.*too short for one step.*raise max_runtime"):
        run("run", "max_runtime=0:00:01")


def test_max_runtime_stops_before_a_step_that_would_not_fit(run, monkeypatch):
    expected = Deadline.exceeded_by
    asked = []

    def late(self, *ahead):
        asked.append(ahead)
        self.limit = 1e9 if len(asked) < 4 else 0.0
        return expected(self, *ahead)

    monkeypatch.setattr(Deadline, "exceeded_by", late)
    with pytest.raises(StopRequested, match=r"after step 3: max_runtime ends in 0 s .*step_3"):
        run("run", "max_runtime=100")
    assert asked[0] == ("step",)
