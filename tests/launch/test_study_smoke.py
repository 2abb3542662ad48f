"""The whole study in a smoke form: stores, base, an arm, evaluations on both windows, record and tables."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clex_train.utils.locations import ROOT
from launch import study_record, study_tables
from tests.data_prep.small_corpora import write_jsonl
from tests.helpers.environments import launch_environment

NUM_BOOKS = 14


def book(number: int) -> str:
    """Write about 60,000 characters of sentences of frequent and rare words."""
    rng = np.random.default_rng(number)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(600)]
    # By Zipf's law, so that a BPE finds words to join.
    draws = np.minimum(rng.zipf(1.3, 10_000) - 1, len(words) - 1)
    sentences = np.array_split([words[draw] for draw in draws], 900)
    return " ".join(f"{' '.join(sentence).capitalize()}." for sentence in sentences)


@pytest.mark.timeout(900)
def test_every_stage_of_the_study_runs_and_the_record_prints_its_tables(tmp_path: Path) -> None:
    books = write_jsonl(tmp_path / "books.jsonl", [{"text": book(number)} for number in range(NUM_BOOKS)])
    given = [
        "--books",
        str(books),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--smoke",
        "--only",
        "yarn_used_lr1",
    ]
    command = [sys.executable, "-m", "launch.study", *given]
    # Tests of this process may have opened a group; the programs of the study open their own.
    environment = launch_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = sorted((tmp_path / "out" / "log").glob("*.txt"))
    assert done.returncode == 0, done.stderr + "".join(log.read_text()[-1000:] for log in logs)
    record = study_record.read(tmp_path / "out" / "report" / "study.json")
    text = (tmp_path / "out" / "report" / "tables.md").read_text()
    assert text == study_tables.text(record)
    assert {(entry.arm, entry.windows) for entry in record.entries} == {
        (arm, windows) for arm in ("base", "yarn_used_lr1") for windows in ("choosing", "judging")
    }
    assert all(name in text for name in ("one_shot", "last_k", "passkey", "repeated statement"))
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "---" not in again.stdout.partition("###")[0], "every stage has its result"
