"""Atomic, durable writes of files and folders, and bounded reads of untrusted files.

Writing: write under another name, fsync, rename, fsync the folder. Without the first fsync the rename may reach the
disk before the data. Everything that a resume or a user depends on goes through this module. Reading: only regular
files, inside their folder and of bounded size.
"""

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clex_train.utils.errors import NO_ROOM, ConfigError, InputError, no_room, require, shortened

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"
DAMAGED = ".damaged"
"""Suffix under which a damaged file, or its damaged lines, are kept."""
SAVING, REPLACED, REMOVING = "saving_", "replaced_", "removing_"
"""Prefixes of folders that only an interrupted program leaves behind."""
LONGEST_NAME = 255
"""Bytes of a file name that file systems accept."""
LFS_HEADER = b"version https://git-lfs.github.com/spec/"
LFS_MOST_BYTES = 1024
"""Maximum size of a pointer by the git-lfs specification."""
LONGEST_LABEL = 200
"""Bytes of a user-given name, which leaves room for suffixes such as `_2.json`."""
LARGEST_RECORD = 16 * 2**20
"""Default limit in bytes for reading a small file (a manifest, a configuration, an evaluation log)."""


class BadFile(InputError):
    """A file has unexpected content; the message names the file, and `reason` gives the cause in a few words."""

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
    """Write a whole file or nothing, text as UTF-8; raises as `write_parts`."""
    write_parts(path, [content.encode() if isinstance(content, str) else content])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Write a whole file or nothing, part by part; `parts` may read from the file that is replaced.

    Raises:
        OSError: the file cannot be written (full disk); names `path`, whose previous content stays.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            publish(file, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        error.filename = str(path)
        raise


def write_together(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Write all of several files into a folder, or none; other files in the folder stay.

    Raises:
        OSError: names a file or the folder. On a full disk no file was replaced, and a folder created here is gone.
    """
    is_new, saving = not folder.exists(), folder / (SAVING + folder.name)
    try:
        shutil.rmtree(saving, ignore_errors=True)
        make_folder(saving)
        for name, content in contents.items():
            write_atomically(saving / name, content)
        # Every file is complete and flushed before the first one takes its place; renames need no space.
        for name in contents:
            os.replace(saving / name, folder / name)
        saving.rmdir()
        sync_directory(folder)
    except OSError as error:
        shutil.rmtree(saving, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        name = Path(str(error.filename)).name
        place = folder / name if name in contents else folder
        raise OSError(error.errno, error.strerror, str(place)) from error


def temporary_path(path: Path) -> Path:
    """Return the path that `write_atomically` writes to first; after a kill it stays until the next write."""
    return path.with_suffix(TEMPORARY_SUFFIX)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, itself last, for files written by libraries."""
    # Bottom up, so that a folder is flushed after its entries.
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_directory(Path(place) / name)
        sync_directory(Path(place))


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, each durable in its parent."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a folder to write into; it replaces `directory` when the block ends without an error.

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
    """Clean up after an interrupted `atomic_directory`: remove partial folders and restore a replaced one."""
    replaced = directory.with_name(REPLACED + directory.name)
    # Killed between the two renames of `_replace_directory`: the old version is the only complete one.
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
        sync_directory(directory.parent)
    for leftover in (replaced, directory.with_name(SAVING + directory.name)):
        if leftover.exists():
            remove_folder(leftover)


def _replace_directory(saving: Path, directory: Path) -> None:
    replaced = directory.with_name(REPLACED + directory.name)
    if directory.exists():
        # A folder cannot be renamed over a non-empty one, so replacing takes two renames.
        directory.rename(replaced)
    saving.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, renamed first, so that a kill in between leaves nothing that looks like damage."""
    doomed = folder if folder.name.startswith(REMOVING) else folder.with_name(f"{REMOVING}{folder.name}")
    try:
        if folder.exists() and doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s)", folder, error)


def make_empty(folder: Path) -> None:
    """Create an empty folder, durably, and remove the leftovers of an earlier attempt."""
    remove_folder(folder)
    make_folder(folder)


def quarantine(path: Path) -> Path:
    """Rename a damaged file out of the way, over an earlier one; return its new name."""
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    sync_directory(path.parent)
    return aside


def is_plain_name(name: str) -> bool:
    """Return True for the name of a folder entry: no separator, no `..`, no terminal controls."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def require_plain_name(key: str, value: str, purpose: str) -> None:
    """Raise `ConfigError` for a name that leaves its folder or is unusable; `purpose` describes its use."""
    fits = is_plain_name(value.strip()) and len(os.fsencode(value)) <= LONGEST_LABEL
    remedy = f"{purpose}: a plain name of 1 to {LONGEST_LABEL} bytes, without slashes"
    require(fits and value.isprintable(), key, shortened(value), remedy)


def require_writable_folder(key: str, value: Path, folder: Path, first_name: str = "") -> None:
    """Raise `ConfigError` unless the output `value` of `key` can be written into `folder`, which may still be missing.

    Leaves nothing behind: a temporary file is created in the nearest existing folder. A full disk is an `OSError`.
    `first_name` is the name under which the output is written at first.
    """
    short = all(len(os.fsencode(name)) <= LONGEST_NAME for name in (*value.parts, first_name))
    remedy = f"a name of more than {LONGEST_NAME} bytes, which no file system accepts; give a shorter one"
    require(short, key, value, remedy)
    folder = folder.absolute()
    # Unlike `Path.exists`, this is False, not an error, below a folder without search permission.
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    require(there.is_dir(), key, value, f"{there} is a file, not a folder; name another place")
    require(os.access(there, os.W_OK | os.X_OK), key, value, f"{there} is read-only; name another place")
    try:
        # `os.access` returns True on full disks, exceeded quotas and some network mounts; only a write is conclusive.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigError(key, value, f"{there} cannot be written to ({error.strerror}); name another place") from error


def is_inside(name: str) -> bool:
    """Return True for a relative path that stays below its base folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def open_regular(path: Path, within: Path | None = None) -> BufferedReader:
    """Open a regular file for reading, without waiting for a pipe or reading a device.

    Args:
        path: the file.
        within: a folder that must contain the file once links are followed; None follows them anywhere.

    Raises:
        BadFile: it is something else, lies elsewhere or cannot be read.
        FileNotFoundError: no such file.
    """
    try:
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            raise BadFile(path, f"leads out of {within}; put a copy of the file there instead")
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        # pathlib raises RuntimeError for a loop of links, and os.open ValueError for a NUL in a name.
        raise BadFile(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    # Checked on the open descriptor: the path may point elsewhere by now.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(path, "not a regular file (a folder, a pipe or a device)")
    return open(descriptor, "rb")


def require_regular(path: Path) -> None:
    """Raise like `open_regular`, before a library opens a file that might block or never end."""
    open_regular(path).close()


def read_regular(path: Path, within: Path | None = None, most: int = LARGEST_RECORD) -> bytes:
    """Read a whole regular file of at most `most` bytes; raises like `open_regular`."""
    try:
        with open_regular(path, within) as file:
            # Python allocates what is requested, so request the file's size, and one byte more to notice growth.
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise BadFile(path, f"cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise BadFile(path, f"larger than {most:,} bytes, the limit for such a file")
    return content


def regular_size(path: Path, within: Path | None = None) -> int:
    """Return the size in bytes of a regular file; raises like `open_regular`."""
    with open_regular(path, within) as file:
        return os.fstat(file.fileno()).st_size


def sha256(path: Path, within: Path | None = None) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; raises like `open_regular`, or `OSError`."""
    with open_regular(path, within) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: str | Path) -> bool:
    """Return True if a file is a git-lfs pointer, left in place of one not downloaded; opens small files only."""
    facts = Path(path).stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > LFS_MOST_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
