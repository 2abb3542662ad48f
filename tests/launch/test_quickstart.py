"""Messages of the quick start when a stage ends early."""

import subprocess
import sys

import pytest

from launch import quickstart


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (75, "stopped on request; the same command resumes this stage: deepspeed train.py +experiment=tiny_base"),
        (3, "error: stage failed with exit code 3: deepspeed train.py +experiment=tiny_base"),
    ],
)
def test_a_stopped_stage_is_not_reported_as_failed(monkeypatch, capsys, code, line):
    def ended() -> None:
        raise subprocess.CalledProcessError(code, ["deepspeed", "train.py", "+experiment=tiny_base"])

    monkeypatch.setattr(quickstart, "corpus", ended)
    monkeypatch.setattr(sys, "argv", ["quickstart"])
    assert quickstart.main() == code
    assert capsys.readouterr().err == f"{line}\n"
