"""Small file systems for tests; tests are skipped if mounting is not permitted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size such as `64k` at `folder`."""
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} none {folder} 2>/dev/null") != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        os.system(f"umount --lazy {folder}")


def resize(folder: Path, size: str) -> None:
    """Give a mounted file system more or less room."""
    assert os.system(f"mount -o remount,size={size} {folder}") == 0
