"""The watchdog on two ranks: one dies, freezes or hangs, and the other exits within the timeout and names it."""

import time
from pathlib import Path

import pytest

from clex_train.utils.errors import RankLost
from tests.helpers.ports import free_port
from tests.helpers.warm_processes import Program, rank_variables

SCRIPT = Path(__file__).with_name("watched_ranks.py")
TIMEOUT = 10.0
STUCK = 240
"""Seconds after which a test fails, with room for a busy machine."""


def pair(fault: str, rank: int, timeout: float = TIMEOUT) -> tuple[Program, Program]:
    """Start both ranks, without a launcher that would end one with the other."""
    port, command = free_port(), [str(SCRIPT), fault, str(rank), str(timeout)]
    first, second = (Program(command, **rank_variables(number, 2, port)) for number in (0, 1))
    return first, second


def await_fault(culprit: Program) -> None:
    """Wait for the line that a rank writes before its fault."""
    stop = time.monotonic() + STUCK
    while culprit.stdout() != "now\n":
        assert time.monotonic() < stop, culprit.stdout()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("killed", 0, "is gone"),
        ("killed", 1, "is gone"),
        ("stopped", 0, "has not answered for"),
        ("stopped", 1, "sent no heartbeat for"),
        ("stuck", 1, "working in stuck_in_its_own_work (watched_ranks.py:"),
    ],
)
def test_the_other_rank_exits_and_names_the_lost_one(fault, rank, words):
    processes = pair(fault, rank)
    culprit, other = processes[rank], processes[1 - rank]
    try:
        await_fault(culprit)
        start = time.monotonic()
        done = other.end(STUCK)
        assert done.returncode == RankLost.exit_code, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(("LOST", "error:"))]
        assert f"rank {rank}" in line, line
        assert f"rank {1 - rank}" not in line, line
        assert words in line, line
        assert time.monotonic() - start < 6 * TIMEOUT, "twice is long"
    finally:
        for process in processes:
            process.kill()


def test_a_rank_that_lost_another_ends_before_slurm_repeats_its_signal():
    """Exit within the ten seconds that SLURM gives a node to end a task (`MessageTimeout`), at the default timeout.

    It takes about five seconds; a busy machine may be late, but not every time.
    """
    taken = []
    while not taken or (taken[-1] >= 10 and len(taken) < 4):
        other, culprit = pair("killed", 1, timeout=1800.0)
        culprit.end(STUCK)
        died = time.monotonic()
        done = other.end(STUCK)
        taken.append(time.monotonic() - died)
        assert done.returncode == RankLost.exit_code
        assert "rank 1 is gone" in done.stderr
    assert min(taken) < 10, taken


def test_ranks_that_finish_are_not_reported_as_lost():
    processes = pair("none", 0)
    for process in processes:
        done = process.end(STUCK)
        assert done.returncode == 0, done.stderr
