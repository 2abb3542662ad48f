"""A rank that dies, freezes or hangs: the other one ends within the timeout and says which rank it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_runs import ROOT, environment
from ports import free_port

from clex_train.faults import RankLost

SCRIPT = Path(__file__).with_name("watched_ranks.py")
TIMEOUT = 10.0
STUCK = 240
"""Seconds after which a test is given up, on a machine with much other work too."""


def pair(fault: str, rank: int, timeout: float = TIMEOUT) -> tuple[subprocess.Popen, subprocess.Popen]:
    """Both ranks, without a launcher that would end one with the other."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SCRIPT), fault, str(rank), str(timeout)]
    first, second = (
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | meeting | {"RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    )
    return first, second


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("killed", 0, "is gone"),
        ("killed", 1, "is gone"),
        ("stopped", 0, "has not answered for"),
        ("stopped", 1, "has given no sign for"),
        ("stuck", 1, "working in stuck_in_its_own_work (watched_ranks.py:"),
    ],
)
def test_the_other_rank_ends_and_names_it(fault, rank, words):
    processes = pair(fault, rank)
    culprit, other = processes[rank], processes[1 - rank]
    try:
        assert culprit.stdout.readline() == "now\n"
        start = time.monotonic()
        _, errors = other.communicate(timeout=STUCK)
        assert other.returncode == RankLost.exit_code, errors
        (line,) = [line for line in errors.splitlines() if line.startswith(("LOST", "error:"))]
        assert f"rank {rank}" in line, line
        assert f"rank {1 - rank}" not in line, line
        assert words in line, line
        assert time.monotonic() - start < 6 * TIMEOUT, "twice is long"
    finally:
        for process in (culprit, other):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()


def test_a_rank_that_lost_another_ends_before_slurm_repeats_its_signal():
    """At the default `engine.timeout`; SLURM gives a node ten seconds (`MessageTimeout`) to end a task.

    It takes about five; a machine with other work may be late, but not each time.
    """
    taken = []
    while not taken or (taken[-1] >= 10 and len(taken) < 4):
        other, culprit = pair("killed", 1, timeout=1800.0)
        culprit.communicate(timeout=STUCK)
        died = time.monotonic()
        _, errors = other.communicate(timeout=STUCK)
        taken.append(time.monotonic() - died)
        assert other.returncode == RankLost.exit_code
        assert "rank 1 is gone" in errors
    assert min(taken) < 10, taken


def test_ranks_that_end_well_are_not_missed():
    processes = pair("none", 0)
    for process in processes:
        _, errors = process.communicate(timeout=STUCK)
        assert process.returncode == 0, errors
