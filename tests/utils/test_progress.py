"""Progress output: a moving bar on a terminal and plain log lines elsewhere."""

import io
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from clex_train.utils import progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lines(monkeypatch, caplog):
    """Return a function that gives the log lines of a task of ten units, each taking `seconds` on the clock of tqdm."""

    def lines_of_task(seconds: float, total: int | None = 10) -> list[str]:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with caplog.at_level(logging.INFO, logger="clex_train"), progress.bar(total, "train") as bar:
            start, clock = bar.start_t, [0.0]
            bar._time = lambda: start + clock[0]
            for _ in range(10):
                clock[0] += seconds
                bar.set_postfix_str("loss 1.5", refresh=False)
                bar.update()
        assert sys.stderr.getvalue() == ""
        return [record.getMessage() for record in caplog.records]

    return lines_of_task


def test_a_long_task_logs_occasional_lines_and_one_at_its_end(lines):
    found = lines(progress.SECONDS_BETWEEN_LINES / 2)
    assert found[0].startswith("train: 20 %, 00:15 so far, ")
    assert found[0].endswith(" left, loss 1.5")
    assert found[-1].startswith("train: 100 %, 01:15 so far, 00:00 left")
    assert len(found) == 6
    assert not any("\r" in line or "█" in line for line in found)


def test_a_short_task_logs_no_line(lines):
    assert lines(0.1) == []


def test_a_task_of_unknown_size_is_counted(lines):
    assert lines(progress.SECONDS_BETWEEN_LINES, total=None)[-1].startswith("train: 10 it, 02:30 so far")


def test_a_line_of_the_log_does_not_break_the_bar_of_a_terminal():
    """Check on a pseudo-terminal, as a user sees it."""
    code = (
        "from clex_train.utils import log, progress; log.setup()\n"
        "with progress.bar(3, 'train') as bar:\n"
        "    bar.update(); log.get('clex_train').info('a checkpoint'); bar.update(2)\n"
    )
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 80))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=child, timeout=120, check=False)
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0
    (line,) = (text for text in shown.replace("\r\n", "\n").split("\n") if "a checkpoint" in text)
    assert "%|" not in line.rsplit("\r", 1)[-1]
    assert "100%|" in shown
