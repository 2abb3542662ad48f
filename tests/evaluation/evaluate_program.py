"""The evaluate program, run in this process."""

import sys

import pytest

from clex_train.cli import evaluate as program
from clex_train.console import program as console


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    return console.run(program.main, program.usage)
