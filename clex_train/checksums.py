"""`checksums.json`: size and SHA-256 of every file of a saved model, written last; without it, a folder is not whole.

A name proves nothing: after a power cut a folder can hold every file, of the right size, full of zeros. Programs of
Hugging Face ignore the file, and files that a user adds later are not in it.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from clex_train import files

NAME = "checksums.json"
LARGEST = 2**24
"""Bytes; a listing of more is none of ours."""


class Damaged(Exception):
    """A folder is not what was written; says in a few words what is wrong with which file."""


def write(folder: Path) -> None:
    """List every file below a folder; call it when they are all written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": files.sha256(path)}
        for path in paths
    }
    files.write_atomically(folder / NAME, json.dumps({"format": 1, "files": listed}, indent=2) + "\n")


def has(folder: Path) -> bool:
    """Tell whether a folder has a listing; those of earlier versions have none."""
    return (folder / NAME).exists()


def require_sizes(folder: Path) -> dict[str, str]:
    """Compare names and sizes with the listing; returns the SHA-256 that each file should have.

    Raises `Damaged`, naming the file.
    """
    listed = _read(folder / NAME)
    for name, (size, _) in listed.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if (found := path.stat().st_size) != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    return {name: digest for name, (_, digest) in listed.items()}


def require_contents(folder: Path) -> None:
    """Compare every byte with the listing: reads the whole folder. Raises `Damaged`, naming the file."""
    for name, digest in require_sizes(folder).items():
        try:
            found = files.sha256(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise Damaged(f"{name} does not have its SHA-256")


def _read(path: Path) -> dict[str, tuple[int, str]]:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise Damaged(f"{NAME} is no listing of files")
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        listed = {str(name): (int(row["size"]), str(row["sha256"])) for name, row in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME} cannot be read") from error
    if outside := [name for name in listed if not _is_inside(name)]:
        raise Damaged(f"{NAME} names a file outside the folder: {outside[0]!r}")
    return listed


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
