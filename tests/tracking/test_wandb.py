"""wandb: its tables and curves in offline files, the login, and the id that a resumed run finds again."""

import json
import os

import pytest
import wandb

from clex_train.config.tracking import TrackingConfig, Wandb
from clex_train.console.errors import explain
from clex_train.tracking.back_ends import require_ready
from clex_train.tracking.evaluations import COLUMNS
from clex_train.tracking.run_id import run_id
from clex_train.utils import distributed
from tests.tracking.trackers import FIGURES, RESULTS, rows, tracker_of


def test_wandb_gets_the_table_of_each_evaluation_and_its_curves(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):
        monkeypatch.setenv(name, "600")  # Seconds, with room for a busy machine.
    tracker = tracker_of(tmp_path, 0, tracking=TrackingConfig(wandb=Wandb.offline))
    tracker.step({"step": 1, **FIGURES})
    tracker.evaluation(2, RESULTS)
    tracker.evaluation(4, RESULTS)
    tracker.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/**/*.table.json"))
    tables = [json.loads(file.read_text()) for file in files if file.parent.name == "evaluation"]
    listed = {file.name.split("_")[0] for file in files}
    assert {"table", "perplexity", "passkey"} <= listed
    own = [table for table in tables if table["columns"] == COLUMNS]
    assert sorted(table["data"] for table in own) == [rows(2), rows(4)]
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
        require_ready(TrackingConfig(wandb=Wandb.online))
    assert explain(caught.value) is not None


@pytest.mark.parametrize("wandb_mode", [Wandb.offline, Wandb.off])
def test_other_modes_need_no_login(without_login, wandb_mode):
    require_ready(TrackingConfig(wandb=wandb_mode))


def test_a_key_or_a_netrc_entry_is_a_login(without_login, monkeypatch):
    netrc = without_login / ".netrc"
    netrc.write_text("machine elsewhere\n login user\n password x\n")
    with pytest.raises(ValueError, match="nobody is logged in"):
        require_ready(TrackingConfig(wandb=Wandb.online))
    netrc.write_text("machine api.wandb.ai\n login user\n password x\n")
    require_ready(TrackingConfig(wandb=Wandb.online))
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    require_ready(TrackingConfig(wandb=Wandb.online))


def test_other_ranks_leave_the_refusal_to_rank_0(without_login, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    require_ready(TrackingConfig(wandb=Wandb.online))


def test_a_damaged_wandb_id_is_moved_and_replaced(tmp_path, caplog):
    path = tmp_path / "wandb_id"
    first = run_id(path)
    assert run_id(path) == first
    path.write_bytes(b"ab\0\0\0\0\xff\n")
    second = run_id(path)
    assert run_id(path) == second != first
    assert "is damaged; moved to wandb_id.damaged" in caplog.text
