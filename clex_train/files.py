"""Write files that a crash or a power cut leaves whole or absent: write beside, fsync, rename, fsync of the folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LFS_HEADER = b"version https://git-lfs.github.com/spec/"
LFS_MOST_BYTES = 1024
"""The most that the specification of git-lfs allows a pointer to have."""


def publish(file: BinaryIO, path: Path) -> None:
    """Flush an open file to disk, close it and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_directory(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        file.write(content)
        publish(file, path)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_or_absent(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `directory` when the block ends without an error."""
    beside = directory.with_name("saving_" + directory.name)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    replaced = directory.with_name("replaced_" + directory.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    beside.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def is_lfs_pointer(path: str | Path) -> bool:
    """Tell whether a file is what git-lfs leaves in place of one not downloaded; only small files are opened."""
    if Path(path).stat().st_size > LFS_MOST_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
