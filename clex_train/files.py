"""Write files that a crash or a power cut leaves whole or absent, and read files that anyone may have written.

Written beside, fsync, rename, fsync of the folder. Read only if regular, inside their folder and of a bounded size.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO


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


LARGEST_RECORD = 16 * 2**20
"""Bytes of a small file (a manifest, a configuration, a log of evaluations) that are read at most by default."""


class BadFile(ValueError):
    """A file is not what its name promises: names the file, and `reason` says what is wrong in a few words."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason

    def __reduce__(self) -> tuple[type["BadFile"], tuple[str, str]]:
        return type(self), (str(self.path), self.reason)


def is_plain_name(name: str) -> bool:
    """Return True for the name of an entry of a folder: no separator, no `..`, nothing that a terminal acts upon."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


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
