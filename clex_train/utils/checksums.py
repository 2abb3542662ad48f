"""`checksums.json`: size and SHA-256 of every file of a saved model, written last; a folder without it is incomplete.

File names prove nothing: after a power cut a folder can hold every file, at the right size, full of zeros. Hugging Face
programs ignore the file, and files that a user adds later are not listed.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from clex_train.utils import files
from clex_train.utils.errors import first_line
from clex_train.utils.files import BadFile
from clex_train.utils.records import Count, read_record

NAME = "checksums.json"


@dataclass(frozen=True)
class _Entry:
    """Size in bytes and SHA-256 of one file."""

    size: Count
    sha256: str


@dataclass(frozen=True)
class _Listing:
    """Contents of the file that are read."""

    files: dict[str, _Entry]


class Damaged(Exception):
    """A folder differs from what was written; the message names the file and the difference."""


def write(folder: Path) -> None:
    """List every file below a folder; call it after all of them are written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": files.sha256(path)}
        for path in paths
    }
    files.write_atomically(folder / NAME, json.dumps({"format": 1, "files": listed}, indent=2) + "\n")


def exists(folder: Path) -> bool:
    """Return True if a folder has a listing; folders of earlier versions have none."""
    # `lexists`: a dangling link is a damaged listing, not a missing one.
    return os.path.lexists(folder / NAME)


def require_sizes(folder: Path) -> dict[str, str]:
    """Compare names and sizes with the listing; return the SHA-256 that each file must have.

    Raises:
        Damaged: a file is missing or has another size.
    """
    listed = _read(folder / NAME)
    for name, (size, _) in listed.items():
        check_size(folder, name, size)
    return {name: digest for name, (_, digest) in listed.items()}


def require_contents(folder: Path) -> None:
    """Compare every byte with the listing, which reads the whole folder. Raises `Damaged`, naming the file."""
    for name, digest in require_sizes(folder).items():
        check_content(folder, name, digest)


def check_size(folder: Path, name: str, size: int, within: Path | None = None) -> None:
    """Compare the size of one file; `within` as in `files.open_regular`. Raises `Damaged`, naming the file."""
    try:
        # Opened as it will be read later, so pipes, devices and links out of `within` are refused here.
        found = files.regular_size(folder / name, within)
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except BadFile as error:
        raise Damaged(f"{name}: {error.reason}") from error
    if found != size:
        raise Damaged(f"{name} has {found} bytes instead of {size}")


def check_content(folder: Path, name: str, digest: str, within: Path | None = None) -> None:
    """Compare the bytes of one file with its SHA-256; otherwise like `check_size`."""
    try:
        found = files.sha256(folder / name, within)
    except (OSError, BadFile) as error:
        raise Damaged(f"{name} cannot be read ({first_line(error)})") from error
    if found != digest:
        raise Damaged(f"{name} does not have its SHA-256")


def _read(path: Path) -> dict[str, tuple[int, str]]:
    try:
        listed = read_record(path, _Listing, within=path.parent).files
    except (BadFile, FileNotFoundError) as error:
        raise Damaged(f"{NAME} cannot be read") from error
    # A listing may come from a stranger: a name with `..` would make us read files elsewhere.
    if outside := [name for name in listed if not files.is_inside(name)]:
        raise Damaged(f"{NAME} names a file outside the folder: {outside[0]!r}")
    return {name: (entry.size, entry.sha256) for name, entry in listed.items()}
