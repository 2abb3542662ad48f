"""Tokenizing with two workers, killed by SIGKILL: resuming gives the same bytes and redoes only missing shards."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from clex_train.token_store.manifest import MANIFEST, partial_path
from clex_train.token_store.store import TokenStore
from tests.data_prep.small_corpora import files_of, tokenize_files, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the clocks were striking thirteen and the day was bright and cold in April "


def finished(output: Path) -> dict[str, int]:
    """Map each finished shard to the time at which it was written."""
    partial = partial_path(output)
    names = [path.stem for path in partial.glob("units/*.json")]
    return {name: (partial / "train" / f"{name}.tokens").stat().st_mtime_ns for name in names}


def kill(command: list[str], after: float, output: Path, shards: int = 0) -> bool:
    """Kill the program and its workers `after` seconds from its first sign of life and from its first `shards` shards.

    Return True if the kill came before the program was done; on a busy machine it can come too late.
    """
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as program:
        while program.poll() is None and not partial_path(output).exists():
            time.sleep(0.01)
        while program.poll() is None and len(list(partial_path(output).glob("units/*.json"))) < shards:
            time.sleep(0.001)
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return not output.exists()


def check_kills(tmp_path: Path, tokenizer_dir: Path, moments: list[float], wanted: int, shards: int = 0) -> None:
    """Kill at each of the moments in turn until `wanted` kills came before the end."""
    corpus = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"{i} {j} {WORDS * 50}"} for j in range(300)]) for i in range(6)
    ]
    whole = tokenize_files(list(corpus), tokenizer_dir, tmp_path / "whole", shard_mb=1)
    output = tmp_path / "store"
    command = [sys.executable, "-m", "data_prep", "tokenize", "workers=2", "shard_mb=1", "corpus.validation_share=0.0"]
    command += [f"corpus.paths=[{','.join(map(str, corpus))}]", f"tokenizer={tokenizer_dir}", f"output={output}"]
    before: dict[str, int] = {}
    kills = 0
    for moment in moments:
        kills += kill(command, moment, output, shards)
        if kills and (output.exists() or (partial_path(output) / MANIFEST).exists()):
            break
        if output.exists():
            shutil.rmtree(output)
            continue
        now = finished(output)
        assert before.items() <= now.items(), "a finished shard was lost or written again"
        before = now
        if kills == wanted:
            break
    assert kills, "killed at least once"
    if not output.exists():
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert files_of(output) == files_of(whole.path)
    for name, written in before.items():
        assert (output / "train" / f"{name}.tokens").stat().st_mtime_ns == written
    assert TokenStore(output).fingerprint == whole.fingerprint
    assert not partial_path(output).exists()


def test_a_program_with_workers_killed_once_ends_with_the_same_bytes(tmp_path: Path, tokenizer_dir: Path) -> None:
    check_kills(tmp_path, tokenizer_dir, [0.0] * 5, wanted=1, shards=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_program_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_dir: Path, seed: int
) -> None:
    generator = random.Random(seed)
    check_kills(tmp_path, tokenizer_dir, [0.0, *(generator.uniform(0, 3) for _ in range(7))], wanted=8)
