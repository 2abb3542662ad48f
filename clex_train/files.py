"""Write files and folders that a crash, a power cut or a full disk leaves whole or absent.

Write under another name, fsync, rename, fsync the folder: a rename reaches the disk before the data of the file unless
that was flushed first. Everything that a resume or a user depends on goes through this module.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from clex_train import log
from clex_train.faults import no_room

logger = log.get(__name__)

UNFINISHED = ".tmp"
DAMAGED = ".damaged"
"""Ending of the name under which a damaged file, or its damaged lines, are kept."""
SAVING, REPLACED, REMOVING = "saving_", "replaced_", "removing_"
"""Prefixes of folders that only an interrupted program leaves behind."""
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


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file or none; text as UTF-8.

    An `OSError`, as of a full disk, names `path`, and what was there stays.
    """
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            publish(file, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        error.filename = str(path)
        raise


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below `folder`, itself last: for files that libraries have written."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_directory(Path(place) / name)
        sync_directory(Path(place))


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each durable in the one above it."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)


@contextmanager
def complete_or_absent(directory: Path) -> Iterator[Path]:
    """Yield a folder to write into; it takes the place of `directory` when the block ends without an error.

    After an error the folder is removed. A full disk is an `OSError` that names `directory`, whichever library met it.
    """
    recover(directory)
    unfinished = directory.with_name(SAVING + directory.name)
    try:
        make_folder(unfinished)
        yield unfinished
        sync_tree(unfinished)
        _take_place(unfinished, directory)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if (cause := no_room(error)) is not None:
            raise OSError(cause.errno, cause.strerror, str(directory)) from error
        raise


def recover(directory: Path) -> None:
    """Remove what an interrupted `complete_or_absent` left; put back what it was about to replace."""
    replaced = directory.with_name(REPLACED + directory.name)
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
        sync_directory(directory.parent)
    for leftover in (replaced, directory.with_name(SAVING + directory.name)):
        if leftover.exists():
            remove_folder(leftover)


def _take_place(unfinished: Path, directory: Path) -> None:
    replaced = directory.with_name(REPLACED + directory.name)
    if directory.exists():
        directory.rename(replaced)
    unfinished.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; under another name first, so that a kill in between leaves nothing that looks like damage."""
    doomed = folder if folder.name.startswith(REMOVING) else folder.with_name(f"{REMOVING}{folder.name}")
    try:
        if folder.exists() and doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s)", folder, error)


def set_aside(path: Path) -> Path:
    """Rename a damaged file out of the way, over an earlier one; returns its new name."""
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    sync_directory(path.parent)
    return aside


def sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on disk, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: str | Path) -> bool:
    """Tell whether a file is what git-lfs leaves in place of one not downloaded; only small files are opened."""
    if Path(path).stat().st_size > LFS_MOST_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
