"""Signals to the stages of a job, and the messages of the job."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import sys
from launch import stages
from clex_train.resilience.stop_requests import Interrupted
stages.listen()
try:
    print("code", stages.run(sys.argv[1:]), flush=True)
    stages.run([sys.executable, "-c", "print('a second stage')"])
except Interrupted as interrupt:
    sys.exit(stages.ended(interrupt))
"""
RANK = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: {answer}); print('ready', flush=True)"


def job(*stage: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, *stage],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [75, 0])
def test_a_signal_reaches_the_rank_and_not_its_launcher_and_no_later_stage_starts(tmp_path, code):
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    )
    process = job(sys.executable, str(launcher), f"{RANK.format(answer=f'sys.exit({code})')}\ntime.sleep(600)")
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "interrupted by SIGINT; finished stages are kept, run the same command to continue\n"
    assert output == ("" if code else "code 0\n"), "the launcher lived to pass on its rank's code"
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_a_second_signal_is_forwarded_too():
    process = job(sys.executable, "-c", f"{RANK.format(answer=0)}\ntime.sleep(600)")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
