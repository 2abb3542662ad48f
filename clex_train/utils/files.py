"""Write files and folders whole or not at all, through power cuts and full disks; read files that anyone has written.

Write under another name, fsync, rename, fsync the folder: a rename reaches the disk before the data of the file unless
that was flushed first. Everything that a resume or a user depends on goes through this module. Read only what is a
regular file, inside its folder and of a bounded size.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clex_train.utils import log
from clex_train.utils.bounds import require, shortened
from clex_train.utils.errors import NO_ROOM, no_room

logger = log.get(__name__)

TEMPORARY_SUFFIX = ".tmp"
DAMAGED = ".damaged"
"""Ending of the name under which a damaged file, or its damaged lines, are kept."""
SAVING, REPLACED, REMOVING = "saving_", "replaced_", "removing_"
"""Prefixes of folders that only an interrupted program leaves behind."""
LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""
LFS_HEADER = b"version https://git-lfs.github.com/spec/"
LFS_MOST_BYTES = 1024
"""The most that the specification of git-lfs allows a pointer to have."""
LONGEST_LABEL = 200
"""Bytes of a name that a user gives, to which endings such as `_2.json` are added."""
LARGEST_RECORD = 16 * 2**20
"""Bytes of a small file (a manifest, a configuration, a log of evaluations) that are read at most by default."""


class BadFile(ValueError):
    """A file is not what its name promises: names the file, and `reason` says what is wrong in a few words."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason

    def __reduce__(self) -> tuple[type["BadFile"], tuple[str, str]]:
        return type(self), (str(self.path), self.reason)


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
    beside = temporary_path(path)
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            publish(file, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        error.filename = str(path)
        raise


def temporary_path(path: Path) -> Path:
    """Return the path under which `write_atomically` writes a file; a kill can leave it, the next write replaces it."""
    return path.with_suffix(TEMPORARY_SUFFIX)


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
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a folder to write into; it takes the place of `directory` when the block ends without an error.

    After an error the folder is removed. A full disk is an `OSError` that names `directory`, whichever library met it.
    """
    recover(directory)
    saving = directory.with_name(SAVING + directory.name)
    try:
        make_folder(saving)
        yield saving
        sync_tree(saving)
        _replace_directory(saving, directory)
    except BaseException as error:
        shutil.rmtree(saving, ignore_errors=True)
        if (cause := no_room(error)) is not None:
            raise OSError(cause.errno, cause.strerror, str(directory)) from error
        raise


def recover(directory: Path) -> None:
    """Remove what an interrupted `atomic_directory` left; put back what it was about to replace."""
    replaced = directory.with_name(REPLACED + directory.name)
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
        sync_directory(directory.parent)
    for leftover in (replaced, directory.with_name(SAVING + directory.name)):
        if leftover.exists():
            remove_folder(leftover)


def _replace_directory(saving: Path, directory: Path) -> None:
    replaced = directory.with_name(REPLACED + directory.name)
    if directory.exists():
        directory.rename(replaced)
    saving.rename(directory)
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


def quarantine(path: Path) -> Path:
    """Rename a damaged file out of the way, over an earlier one; returns its new name."""
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    sync_directory(path.parent)
    return aside


def is_plain_name(name: str) -> bool:
    """Return True for the name of an entry of a folder: no separator, no `..`, nothing that a terminal acts upon."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def require_plain_name(key: str, value: str, purpose: str) -> None:
    """Raise `ValueError` for a name that leads out of its folder or names no file; `purpose` says what it becomes."""
    fits = is_plain_name(value.strip()) and len(os.fsencode(value)) <= LONGEST_LABEL
    remedy = f"{purpose}: a plain name of 1 to {LONGEST_LABEL} bytes, without slashes"
    require(fits and value.isprintable(), key, shortened(value), remedy)


def require_writable_folder(key: str, value: Path, folder: Path, beside: str = "") -> None:
    """Raise `ValueError` unless `folder` can be written in, or made, for the output `value` of `key`.

    Makes nothing that stays: the nearest folder that is there has to take a file. A full disk is an `OSError`. `beside`
    is the name under which the output is written at first.
    """
    short = all(len(os.fsencode(name)) <= LONGEST_NAME for name in (*value.parts, beside))
    remedy = f"a name of more than {LONGEST_NAME} bytes, which no disk takes; give a shorter one"
    require(short, key, value, remedy)
    folder = folder.absolute()
    # Unlike `Path.exists`, False in a folder that may not be looked into.
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    require(there.is_dir(), key, value, f"{there} is a file, not a folder; name another place")
    require(os.access(there, os.W_OK | os.X_OK), key, value, f"{there} is read-only; name another place")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ValueError(f"{key}={value}: {there} takes no files ({error.strerror}); name another place") from error


def is_inside(name: str) -> bool:
    """Return True for a relative path that names something below the folder it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def open_regular(path: Path, within: Path | None = None) -> BufferedReader:
    """Open a regular file for reading; a pipe is not waited for and a device not read.

    Args:
        path: the file.
        within: a folder that the file has to lie in once links are followed; None follows them anywhere.

    Raises:
        BadFile: it is something else, lies elsewhere or cannot be read.
        FileNotFoundError: there is nothing of this name.
    """
    try:
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            raise BadFile(path, f"leads out of {within}; put a copy of the file there instead")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        # A loop of links is a RuntimeError of pathlib, a NUL in a name a ValueError.
        raise BadFile(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(path, "not a regular file but a folder, a pipe or a device")
    return open(descriptor, "rb")


def require_regular(path: Path) -> None:
    """Raise as `open_regular` does, before a library opens a file that it would wait for or read without end."""
    open_regular(path).close()


def read_regular(path: Path, within: Path | None = None, most: int = LARGEST_RECORD) -> bytes:
    """Read a whole regular file of at most `most` bytes; raises as `open_regular`."""
    try:
        with open_regular(path, within) as file:
            # As much as there is, since Python reserves what is asked for, and one byte more for a file that grows.
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise BadFile(path, f"cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise BadFile(path, f"larger than {most:,} bytes, which no such file is")
    return content


def regular_size(path: Path, within: Path | None = None) -> int:
    """Return the size in bytes of a regular file; raises as `open_regular`."""
    with open_regular(path, within) as file:
        return os.fstat(file.fileno()).st_size


def sha256(path: Path, within: Path | None = None) -> str:
    """SHA-256 of a regular file as it lies on disk, in hexadecimal; raises as `open_regular`, or `OSError`."""
    with open_regular(path, within) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: str | Path) -> bool:
    """Tell whether a file is what git-lfs leaves in place of one not downloaded; opens small files alone."""
    facts = Path(path).stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > LFS_MOST_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
