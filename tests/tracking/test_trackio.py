"""trackio: runs in its own database, read back through its library; what is missing is refused."""

import sys
from importlib.util import find_spec

import pytest

from clex_train.config.tracking import BackEnd, TrackingConfig
from clex_train.tracking import trackio as back_end
from clex_train.tracking.back_ends import require_ready
from clex_train.utils.errors import ConfigError
from tests.tracking.trackers import FIGURES, RESULTS, rows, tracker_of

needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="needs requirements-tracking.txt")


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Return the database of trackio, in a folder of its own."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    from trackio import utils

    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        for name in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / "trackio" / ("" if name == "TRACKIO_DIR" else "media"))
    assert tmp_path / "trackio" == utils.TRACKIO_DIR
    return storage.SQLiteStorage


@needs_trackio
def test_metrics_tables_and_curves_are_in_the_database_and_a_resumed_run_continues(tmp_path, storage, capsys):
    tracking = TrackingConfig(name=BackEnd.trackio, project="tests")
    tracker = tracker_of(tmp_path, 0, tracking=tracking, name="a run")
    tracker.step({"step": 1, **FIGURES, "mfu": 0.4, "rows": [[0, 3]]})
    tracker.evaluation(1, RESULTS)
    tracker.close(finished=False)
    # A changed name is no other run: the folder decides.
    resumed = tracker_of(tmp_path, 1, tracking=tracking, name="renamed")
    resumed.step({"step": 2, **FIGURES})
    resumed.close()
    (run,) = storage.get_runs("tests")
    assert run == (tmp_path / "trackio_id").read_text().strip()
    assert run.startswith("a_run-")
    logs = storage.get_logs("tests", run)
    assert [(log["step"], log["loss"]) for log in logs if "loss" in log] == [(1, 1.0), (2, 1.0)]
    assert next(log["mfu"] for log in logs if "mfu" in log) == 0.4
    shown = next(log for log in logs if "evaluation/table" in log)
    assert [[*row.values()] for row in shown["evaluation/table"]["_value"]] == rows(1)
    assert {"evaluation/perplexity", "evaluation/passkey"} <= {*shown}
    assert [*(tmp_path / "trackio").rglob("*.png")]
    # Standard output has results only.
    assert capsys.readouterr().out == ""


def test_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"tracking=trackio: .*requirements-tracking\.txt"):
        require_ready(TrackingConfig(name=BackEnd.trackio))


def test_a_space_without_a_login_is_refused_with_the_remedy(monkeypatch):
    import huggingface_hub

    # The library itself does not matter here, so that the rule is tested without it too.
    monkeypatch.setattr(back_end, "library", object)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    tracking = TrackingConfig(name=BackEnd.trackio, space="owner/name")
    with pytest.raises(ConfigError, match=r"tracking\.space=owner/name: nobody is logged in.*hf auth login"):
        require_ready(tracking)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    require_ready(tracking)
