"""TensorBoard: event files, read back by its own reader."""

import errno
import logging
import sys

import pytest

pytest.importorskip("tensorboard", reason="needs requirements-tracking.txt")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from clex_train.config.tracking import BackEnd, TrackingConfig
from clex_train.tracking.back_ends import require_ready
from clex_train.utils.errors import ConfigError
from tests.tracking.trackers import FIGURES, RESULTS, rows, tracker_of

TRACKING = TrackingConfig(name=BackEnd.tensorboard)


def read(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_metrics_tables_and_curves_are_in_the_event_files(tmp_path):
    tracker = tracker_of(tmp_path, 0, tracking=TRACKING)
    tracker.step({"step": 1, **FIGURES, "mfu": 0.4, "rows": [[0, 3]]})
    tracker.evaluation(2, RESULTS)
    tracker.close()
    events = read(tmp_path)
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in ("loss", "mfu")} == {
        "loss": [(1, 1.0)],
        "mfu": [(1, pytest.approx(0.4))],
    }
    assert events.Scalars("perplexity/trained/one_shot/128")[0].value == 11.5
    (table,) = events.Tensors("evaluation/table/text_summary")
    lines = make_ndarray(table.tensor_proto).item().decode().splitlines()
    assert table.step == 2
    assert [line.strip("| ").split(" | ") for line in lines[2:]] == [[str(cell) for cell in row] for row in rows(2)]
    images = events.Tags()["images"]
    assert sorted(images) == ["evaluation/passkey", "evaluation/perplexity"]
    assert events.Images("evaluation/perplexity")[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    tracker = tracker_of(tmp_path, 0, tracking=TRACKING)
    for step in range(1, 5):
        tracker.step({"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    tracker.close(finished=False)
    resumed = tracker_of(tmp_path, 2, tracking=TRACKING)
    resumed.step({"step": 3, "loss": 2.0, "tokens_per_second": 1.0})
    resumed.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_roll_back_replaces_the_steps_that_it_repeats(tmp_path):
    tracker = tracker_of(tmp_path, 0, tracking=TRACKING)
    for step in range(1, 5):
        tracker.step({"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    tracker.roll_back(2)
    tracker.step({"step": 3, "loss": 2.0, "tokens_per_second": 1.0})
    tracker.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_full_disk_is_logged_once_and_training_continues(tmp_path, monkeypatch, caplog):
    tracker = tracker_of(tmp_path, 0, tracking=TRACKING)

    def add_scalar(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker._shown._writer, "add_scalar", add_scalar)
    for step in (1, 2):
        tracker.step({"step": step, **FIGURES})
    tracker.close()
    (said,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert said.endswith("tensorboard: cannot be written (No space left on device); TensorBoard gets nothing more")
    assert tracker.fault is None


def test_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracking=tensorboard: .*requirements-tracking\.txt"):
        require_ready(TRACKING)
