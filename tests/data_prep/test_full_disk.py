"""Tokenizing to a full disk, a small tmpfs: finished shards are kept, and the same command resumes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clex_train.token_store.manifest import partial_path
from tests.data_prep.small_corpora import files_of, tokenize_files, write_jsonl

DISK_KB = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs more rights")
    yield folder
    # A lazy unmount, because a file may stay open until garbage collection.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Write three files of more than a megabyte, one shard each."""
    words = "the clocks were striking thirteen and the day was bright and cold in April "
    return [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i} {words * 12}"} for i in range(1150)])
        for name in "abc"
    ]


def fill(disk: Path, leave_kb: int) -> Path:
    """Fill the disk, as another program could."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "other").write_bytes(b"\0" * max(0, free - leave_kb * 1024))
    return disk / "other"


def complete_store(tmp_path: Path, corpus: list[Path], tokenizer_dir: Path) -> tuple[dict[str, bytes], int]:
    """Return the files of the store, written to a larger disk, and the size of its first shard."""
    store = tokenize_files(list(corpus), tokenizer_dir, tmp_path / "whole", shard_mb=1)
    return files_of(store.path), (store.path / "train" / "00000.tokens").stat().st_size


def test_finished_shards_survive_a_disk_that_fills_up(
    disk: Path, corpus: list[Path], tmp_path: Path, tokenizer_dir: Path
) -> None:
    whole, shard_bytes = complete_store(tmp_path, corpus, tokenizer_dir)
    assert len([name for name in whole if name.endswith(".tokens")]) > 2
    other = fill(disk, leave_kb=int(1.6 * shard_bytes / 1024) + 130)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"output=.*: the disk is full; free some space and run the same command"):
            tokenize_files(list(corpus), tokenizer_dir, disk / "store", shard_mb=1)
        partial = partial_path(disk / "store")
        kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("train/*.tokens")}
        assert sorted(kept) == ["00000.tokens"]
        assert (partial / "train" / "00000.tokens").read_bytes() == whole["train/00000.tokens"]
        assert not (disk / "store").exists()
    other.unlink()
    store = tokenize_files(list(corpus), tokenizer_dir, disk / "store", shard_mb=1)
    assert files_of(store.path) == whole
    assert (store.path / "train" / "00000.tokens").stat().st_mtime_ns == kept["00000.tokens"], "not written again"


def test_nothing_is_lost_if_the_disk_fills_before_the_manifest(
    disk: Path, corpus: list[Path], tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = complete_store(tmp_path, corpus[:1], tokenizer_dir)
    others = []

    def full_before(*arguments: object) -> None:
        others.append(fill(disk, leave_kb=0))
        publish(*arguments)

    from data_prep.tokenize import run as tokenize

    publish = tokenize.publish
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "publish", full_before)
        with pytest.raises(ValueError, match="the disk is full; free some space and run the same command again"):
            tokenize_files(corpus[:1], tokenizer_dir, disk / "store", shard_mb=1)
    assert not (disk / "store").exists()
    others[0].unlink()
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.tokenize.shards.tokenize_unit", lambda *_: pytest.fail("nothing is left to tokenize"))
        store = tokenize_files(corpus[:1], tokenizer_dir, disk / "store", shard_mb=1)
    assert files_of(store.path) == whole


def test_a_disk_that_is_full_from_the_start_is_reported(
    disk: Path, corpus: list[Path], tmp_path: Path, tokenizer_dir: Path
) -> None:
    other = fill(disk, leave_kb=0)
    with pytest.raises(ValueError, match=r"the disk is full|cannot write there"):
        tokenize_files(corpus[:1], tokenizer_dir, disk / "store", shard_mb=1)
    other.unlink()
    store = tokenize_files(corpus[:1], tokenizer_dir, disk / "store", shard_mb=1)
    assert files_of(store.path) == complete_store(tmp_path, corpus[:1], tokenizer_dir)[0]
