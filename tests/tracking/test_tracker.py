"""The tracker: metrics.jsonl with every step once, wandb, and full disks."""

import errno
import io
import json
import math
import os
import sys

import pytest
import wandb

from clex_train.config.checkpoint import OnFullDisk
from clex_train.config.root import Config
from clex_train.config.tracking import TrackingConfig, Wandb
from clex_train.console.errors import explain
from clex_train.tracking import metrics_log
from clex_train.tracking.tracker import COLUMNS, Tracker, _wandb_id, require_login, write_environment
from clex_train.utils import distributed
from clex_train.utils.errors import RunStopped

FIGURES = {"loss": 1.0, "tokens_per_second": 10.0}


def _tracker(run_dir, first_step, steps=6, wandb=Wandb.off, on_full_disk="stop"):
    config = Config(tracking=TrackingConfig(wandb=wandb))
    config.checkpoint.on_full_disk = OnFullDisk[on_full_disk]
    config.optim.steps = steps
    return Tracker(config, run_dir, first_step)


def test_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    tracker = _tracker(tmp_path, 0)
    for step in range(1, 5):
        tracker.step({"step": step, **FIGURES})
    tracker.close()
    resumed = _tracker(tmp_path, 2)
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
    tracker = _tracker(tmp_path, 0)
    tracker.evaluation(3, {"perplexity/trained/one_shot/128": 12.5})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "perplexity/trained/one_shot/128": 12.5}


def test_a_step_is_evaluated_once_even_for_retrieval_alone(tmp_path):
    tracker = _tracker(tmp_path, 0)
    tracker.step({"step": 2, **FIGURES, "rows/books": 4})
    tracker.evaluation(3, {"passkey/trained/128": 0.5})
    tracker.close()
    resumed = _tracker(tmp_path, 4)
    assert [resumed.lacks_evaluation(step) for step in (2, 3)] == [True, False]
    resumed.close()


def test_wandb_gets_the_table_of_each_evaluation_and_its_curves(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):
        monkeypatch.setenv(name, "600")  # Seconds, with room for a busy machine.
    results = {
        "perplexity/trained/one_shot/64": 12.0,
        "perplexity/trained/one_shot/128": 11.5,
        "perplexity/ntk/one_shot/128": math.inf,
        "passkey/trained/128": 0.75,
    }
    tracker = _tracker(tmp_path, 0, wandb=Wandb.offline)
    tracker.step({"step": 1, **FIGURES})
    tracker.evaluation(2, results)
    tracker.evaluation(4, results)
    tracker.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/**/*.table.json"))
    tables = [json.loads(file.read_text()) for file in files if file.parent.name == "evaluation"]
    listed = {file.name.split("_")[0] for file in files}
    assert {"table", "perplexity", "passkey"} <= listed
    own = [table for table in tables if table["columns"] == COLUMNS]
    assert sorted(table["data"] for table in own) == [
        [
            [step, "perplexity", "trained", "one_shot", 64, 12.0],
            [step, "perplexity", "trained", "one_shot", 128, 11.5],
            [step, "passkey", "trained", "", 128, 0.75],
        ]
        for step in (2, 4)
    ]
    curves = [table for table in tables if table["columns"] != COLUMNS]
    assert [64, "trained, one_shot", 12.0] in [row for table in curves for row in table["data"]]


@pytest.fixture
def without_login(monkeypatch, tmp_path):
    """Set a home directory without a login to wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    yield tmp_path
    wandb.teardown()


def test_online_without_a_login_is_refused_with_the_remedy(without_login):
    with pytest.raises(ValueError, match=r"tracking\.wandb=online: nobody is logged in.*WANDB_API_KEY") as caught:
        require_login(TrackingConfig(wandb=Wandb.online))
    assert explain(caught.value) is not None


@pytest.mark.parametrize("wandb_mode", [Wandb.offline, Wandb.off])
def test_other_modes_need_no_login(without_login, wandb_mode):
    require_login(TrackingConfig(wandb=wandb_mode))


def test_a_key_or_a_netrc_entry_is_a_login(without_login, monkeypatch):
    netrc = without_login / ".netrc"
    netrc.write_text("machine elsewhere\n login user\n password x\n")
    with pytest.raises(ValueError, match="nobody is logged in"):
        require_login(TrackingConfig(wandb=Wandb.online))
    netrc.write_text("machine api.wandb.ai\n login user\n password x\n")
    require_login(TrackingConfig(wandb=Wandb.online))
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    require_login(TrackingConfig(wandb=Wandb.online))


def test_other_ranks_leave_the_refusal_to_rank_0(without_login, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    require_login(TrackingConfig(wandb=Wandb.online))


def test_a_damaged_wandb_id_is_moved_and_replaced(tmp_path, caplog):
    path = tmp_path / "wandb_id"
    first = _wandb_id(path)
    assert _wandb_id(path) == first
    path.write_bytes(b"ab\0\0\0\0\xff\n")
    second = _wandb_id(path)
    assert _wandb_id(path) == second != first
    assert "is damaged; moved to wandb_id.damaged" in caplog.text


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
    tracker = _tracker(tmp_path, 0, on_full_disk="continue")
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
    tracker = _tracker(tmp_path, 0)
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
        _tracker(tmp_path, 0)
