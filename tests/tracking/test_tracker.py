"""The tracker: metrics.jsonl with every step once, and full disks."""

import errno
import io
import json
import sys

import pytest

from clex_train.tracking import metrics_log
from clex_train.tracking.environment import write_environment
from clex_train.utils.errors import RunStopped
from tests.tracking.trackers import FIGURES, tracker_of


def test_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    tracker = tracker_of(tmp_path, 0)
    for step in range(1, 5):
        tracker.step({"step": step, **FIGURES})
    tracker.close()
    resumed = tracker_of(tmp_path, 2)
    for step in range(3, 7):
        resumed.step({"step": step, **FIGURES})
    resumed.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_environment_records_the_command_as_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "name='1e3'"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "--local_rank=0", "name=1e3"])
    write_environment(tmp_path, 0, "f")
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["command"] == [sys.executable, "-u", "train.py", "--local_rank=0", "name=1e3"]


def test_evaluations_record_their_step(tmp_path):
    tracker = tracker_of(tmp_path, 0)
    tracker.evaluation(3, {"perplexity/trained/one_shot/128": 12.5})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "perplexity/trained/one_shot/128": 12.5}


def test_a_step_is_evaluated_once_even_for_retrieval_alone(tmp_path):
    tracker = tracker_of(tmp_path, 0)
    tracker.step({"step": 2, **FIGURES, "rows/books": 4})
    tracker.evaluation(3, {"passkey/trained/128": 0.5})
    tracker.close()
    resumed = tracker_of(tmp_path, 4)
    assert [resumed.lacks_evaluation(step) for step in (2, 3)] == [True, False]
    resumed.close()


@pytest.fixture
def full_log(tmp_path, monkeypatch):
    """Return a switch that makes the disk full for appends to metrics.jsonl."""
    full = [False]
    write = io.FileIO.write

    class Disk(io.FileIO):
        def write(self, content):
            if not full[0]:
                return write(self, content)
            write(self, content[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_log, "open_to_append", lambda path: Disk(path, "ab"))
    return full


def test_metrics_wait_for_room_on_a_full_disk_while_training_continues(tmp_path, full_log, caplog):
    tracker = tracker_of(tmp_path, 0, on_full_disk="continue")
    for step in range(1, 6):
        full_log[0] = step in (2, 3)
        tracker.step({"step": step, **FIGURES})
        assert tracker.fault is None
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'metrics.jsonl'}: cannot be written (No space left on device); its lines wait")


def test_metrics_on_a_full_disk_stop_the_run_without_a_partial_line(tmp_path, full_log, caplog):
    tracker = tracker_of(tmp_path, 0)
    tracker.step({"step": 1, **FIGURES})
    full_log[0] = True
    tracker.step({"step": 2, **FIGURES})
    assert tracker.fault == f"{tmp_path / 'metrics.jsonl'}: cannot be written (No space left on device)"
    tracker.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
    assert "lines lost at its end: 1" in caplog.text


def test_a_log_that_cannot_be_opened_stops_the_launch_naming_the_file(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))

    monkeypatch.setattr(metrics_log, "open_to_append", full)
    with pytest.raises(
        RunStopped, match=r"metrics\.jsonl: cannot be written \(Disk quota exceeded\).*make room and run"
    ):
        tracker_of(tmp_path, 0)
