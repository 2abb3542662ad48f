"""Universal conversion of a checkpoint: interrupted, failing, or orphaned by the process that started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from clex_train.checkpoint import universal
from clex_train.console import program as console
from clex_train.utils.errors import StopRequested

ROOT = Path(__file__).resolve().parents[2]
BAR = "sys.stderr.write('50%|#####     | 1/2 [00:01<00:01,  1.0it/s]\\r'); sys.stderr.flush()"
started: list[subprocess.Popen] = []


@pytest.fixture
def make_checkpoint(tmp_path, monkeypatch):
    """Return a function that makes a checkpoint whose conversion runs the given program."""

    def with_program(program: str) -> Path:
        def start(checkpoint, staging, log):
            (staging / checkpoint.name).mkdir(parents=True)
            command = [sys.executable, "-c", f"import os, sys, time\n{BAR}\n{program}"]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True))
            return started[-1]

        monkeypatch.setattr(universal, "_start", start)
        return tmp_path / "checkpoints" / "step_4"

    return with_program


def test_a_stop_request_ends_the_conversion_and_removes_its_output(make_checkpoint, monkeypatch):
    monkeypatch.setattr(universal, "PATIENCE", 0.1)
    checkpoint = make_checkpoint("time.sleep(600)")
    with pytest.raises(
        StopRequested, match=r"step_4 was being converted for 1 ranks; it is intact; the same"
    ) as stopped:
        universal.convert(checkpoint, lambda: True)
    assert console.report(stopped.value) == console.RESUMABLE
    assert started[-1].returncode == -signal.SIGKILL
    assert not list(checkpoint.parent.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_ended_by_a_launchers_signal_counts_as_a_stop_request(make_checkpoint, number):
    checkpoint = make_checkpoint(
        f"import signal; signal.signal({int(number)}, signal.SIG_DFL); os.kill(os.getpid(), {number})"
    )
    with pytest.raises(StopRequested):
        universal.convert(checkpoint, lambda: False)
    assert not list(checkpoint.parent.iterdir())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("sys.exit('ZeRO stage 7 is unknown')", r"\(ZeRO stage 7 is unknown\)"),
        ("sys.exit(1)", r"\(its process exited with 1\)"),
        ("os.kill(os.getpid(), 9)", r"\(its process was killed by SIGKILL, perhaps out of memory\)"),
    ],
)
def test_the_error_of_a_failed_conversion_has_its_reason_and_no_progress_bar(make_checkpoint, program, reason):
    with pytest.raises(ValueError, match=rf"cannot be converted for 1 ranks {reason}; launch as many"):
        universal.convert(make_checkpoint(program), lambda: False)


def test_a_conversion_and_its_workers_end_with_the_rank_that_started_it():
    program = (
        "import subprocess, sys, threading, time; from clex_train.checkpoint import convert\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "threading.Thread(target=convert.end_with_parent, daemon=True).start()\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children()
    assert workers
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_a_conversion_ends_with_its_rank_also_during_its_imports(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "clex_train.checkpoint.convert", str(tmp_path), str(tmp_path / "converted")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "converted").exists()
