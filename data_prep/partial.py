"""Write a store: begun or continued in `<output>.partial`, complete when renamed.

<output>.partial/lock           held by the program that writes
                 request.json   what the content depends on: a later program continues only the same request
                 units/*.json   one record a finished shard
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clex_train.data.manifest import MANIFEST, Manifest, partial_path, read_manifest
from clex_train.data.writer import move_store
from clex_train.utils import log
from clex_train.utils.bounds import require
from clex_train.utils.errors import NO_ROOM
from clex_train.utils.files import BadFile, make_folder, require_place, write_atomically
from clex_train.utils.locks import Lock, try_lock
from clex_train.utils.records import read_json
from data_prep.tokenize.shards import UNITS

logger = log.get(__name__)

LOCK = "lock"
REQUEST = "request.json"
_NOT_RECORDED = {"bos": False}
"""Values of settings that stores of earlier versions do not record."""


def is_done(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Tell whether `output` holds the store of these settings already.

    With `overwrite`, what a program that was killed right after it had replaced a store has left is removed.

    Raises:
        ValueError: it holds something else, and may not be overwritten.
    """
    if not output.exists():
        return False
    differences = ["it is no token store"]
    if (output / MANIFEST).is_file():
        differences = _differences(_NOT_RECORDED | read_manifest(output).settings, _NOT_RECORDED | settings)
    if differences and not overwrite:
        raise ValueError(
            f"output={output}: exists with other content ({'; '.join(differences)}); choose another, or overwrite=true"
        )
    if overwrite and not differences:
        shutil.rmtree(_replaced(output), ignore_errors=True)
    return not differences


@contextmanager
def open_partial(output: Path, settings: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield the locked directory to write in, empty or with what an earlier program of the same settings finished.

    Raises:
        ValueError: not writable, in use, or begun with other settings. After one from the caller, a directory without
            anything finished is removed, so that the corrected command finds nothing in its way.
    """
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / LOCK, "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(f"output={output}: cannot write there ({error.strerror}); choose another place") from error
    with lock:
        if try_lock(lock, partial / LOCK, "let no other program write this store meanwhile") is Lock.busy:
            raise ValueError(f"output={output}: another program is writing this store; wait for it")
        if not _continues(partial, settings, overwrite):
            _begin(partial, settings)
        try:
            yield partial
        except ValueError:
            if not _has_work(partial):
                # NFS keeps the open lock under another name: what then stays is taken over by the next command.
                shutil.rmtree(partial, ignore_errors=True)
            raise


def require_free(output: Path, wanted: str, overwrite: bool) -> None:
    """Raise `ValueError` if `output`, a "file" or "directory" as `wanted` says, is there and cannot be replaced."""
    if not os.path.exists(output):  # unlike that of a `Path`, no error for a name that is too long
        return
    require(overwrite, "output", output, f"exists; choose another {wanted}, or overwrite=true")
    found = "directory" if output.is_dir() else "file"
    require(found == wanted, "output", output, f"is a {found}, which no {wanted} replaces; choose another {wanted}")


def require_place_of_store(output: Path) -> None:
    """Raise `ValueError` if no store can be written at `output`, before anything is read; makes nothing."""
    with disk_full_explained(output):
        require_place("output", output, output.parent, partial_path(output).name)


def require_writable(output: Path) -> None:
    """Make the folder that `output` is to lie in; `ValueError` if it cannot be written."""
    require_place("output", output, output.parent, output.name + ".partial")
    try:
        make_folder(output.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ValueError(f"output={output}: cannot write there ({error.strerror}); choose another place") from error


@contextmanager
def disk_full_explained(output: Path) -> Iterator[None]:
    """Raise `ValueError` with the remedy if what is written meanwhile finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        remedy = "free some space and run the same command again; what is finished is kept"
        raise ValueError(f"output={output}: the disk is full; {remedy}") from error


def publish(partial: Path, manifest: Manifest, output: Path) -> None:
    """Complete the store: manifest first, so that a program killed here leaves nothing but renaming to the next."""
    write_atomically(partial / MANIFEST, manifest.to_json().encode())
    shutil.rmtree(partial / UNITS, ignore_errors=True)
    for name in (REQUEST, LOCK):
        (partial / name).unlink(missing_ok=True)
    if output.exists():
        # A folder is not renamed over one that a kill has left.
        shutil.rmtree(_replaced(output), ignore_errors=True)
        os.rename(output, _replaced(output))
    move_store(partial, output)
    shutil.rmtree(_replaced(output), ignore_errors=True)


def _replaced(output: Path) -> Path:
    """Return where a store waits until the one that replaces it has its name."""
    return output.with_name(output.name + ".replaced")


def _continues(partial: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    before = _earlier_settings(partial)
    if before is None or not _has_work(partial):
        return False
    differences = _differences(_NOT_RECORDED | before, _NOT_RECORDED | settings)
    if differences and not overwrite:
        raise ValueError(
            f"output={partial}: half written with other settings ({'; '.join(differences)}); run the earlier command "
            "again to finish it, or overwrite=true to begin anew"
        )
    return not differences


def _has_work(partial: Path) -> bool:
    """Tell whether anything is finished that another command would have to throw away."""
    units = (_own_record(unit).get("shards") for unit in (partial / UNITS).glob("*.json"))
    return (partial / MANIFEST).is_file() or any(units)


def _earlier_settings(partial: Path) -> dict[str, Any] | None:
    if (partial / MANIFEST).is_file():
        return read_manifest(partial).settings
    if (partial / REQUEST).is_file():
        return _own_record(partial / REQUEST)
    return None


def _own_record(path: Path) -> dict[str, Any]:
    """Read a file that this program has left in a partial directory; `ValueError` for one that is damaged."""
    try:
        content = read_json(path, within=path.parent)
    except BadFile as error:
        raise ValueError(f"{error}; remove the file and run the same command again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged; remove the file and run the same command again")
    return content


def _begin(partial: Path, settings: dict[str, Any]) -> None:
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    (partial / UNITS).mkdir()
    write_atomically(partial / REQUEST, json.dumps(settings).encode())


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """List the keys whose values differ, with both values."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return found
