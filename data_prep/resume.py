"""Write a store in `<output>.partial`: start or continue there, and rename it when complete.

<output>.partial/lock           locked by the program that writes
                 request.json   settings that determine the content: only an equal request continues
                 units/*.json   one record per finished shard
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clex_train.token_store.manifest import MANIFEST, Manifest, partial_path, read_manifest
from clex_train.token_store.writer import move_store
from clex_train.utils import log
from clex_train.utils.errors import NO_ROOM, ConfigError, require
from clex_train.utils.files import BadFile, make_folder, require_writable_folder, write_atomically
from clex_train.utils.locks import Lock, try_lock
from clex_train.utils.records import read_json
from data_prep.tokenize.shards import UNITS

logger = log.get(__name__)

LOCK = "lock"
REQUEST = "request.json"
_NOT_RECORDED = {"bos": False}
"""Values of settings that stores of earlier versions do not record."""


def is_done(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Return True if `output` already is the store of these settings.

    Raises:
        ConfigError: it has other content and may not be overwritten.
    """
    if not output.exists():
        return False
    differences = ["it is not a token store"]
    if (output / MANIFEST).is_file():
        differences = _differences(_NOT_RECORDED | read_manifest(output).settings, _NOT_RECORDED | settings)
    if differences and not overwrite:
        raise ConfigError(
            "output",
            output,
            f"exists with other content ({'; '.join(differences)}); choose another path, or set overwrite=true",
        )
    if overwrite and not differences:
        # A program killed right after replacing a store leaves the old one behind.
        shutil.rmtree(_replaced(output), ignore_errors=True)
    return not differences


@contextmanager
def open_partial(output: Path, settings: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield the locked directory to write in, empty or with the finished work of an earlier program.

    Raises:
        ConfigError: the directory is not writable, in use, or was started with other settings.
    """
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / LOCK, "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError("output", output, f"cannot write there ({error.strerror}); choose another path") from error
    with lock:
        if try_lock(lock, partial / LOCK, "make sure that no other program writes this store meanwhile") is Lock.busy:
            raise ConfigError("output", output, "another program is writing this store; wait for it to finish")
        if not _continues(partial, settings, overwrite):
            _begin(partial, settings)
        try:
            yield partial
        except ValueError:
            # Bad input: remove a directory without finished work, so that the corrected command can start.
            if not _has_work(partial):
                # NFS keeps an open lock under another name; the next command takes over such a directory.
                shutil.rmtree(partial, ignore_errors=True)
            raise


def require_free(output: Path, wanted: str, overwrite: bool) -> None:
    """Raise `ConfigError` if `output` exists and cannot be replaced; `wanted` is "file" or "directory"."""
    if not os.path.exists(output):  # unlike Path.exists, returns False for a name that is too long
        return
    require(overwrite, "output", output, f"exists; choose another {wanted}, or set overwrite=true")
    found = "directory" if output.is_dir() else "file"
    require(
        found == wanted, "output", output, f"is a {found}, which a {wanted} cannot replace; choose another {wanted}"
    )


def require_place_of_store(output: Path) -> None:
    """Raise `ConfigError` if no store can be written at `output`; creates nothing, so it can run before any reading."""
    with disk_full_explained(output):
        require_writable_folder("output", output, output.parent, partial_path(output).name)


def require_writable(output: Path) -> None:
    """Create the parent directory of `output`; raise `ConfigError` if it cannot be written."""
    require_writable_folder("output", output, output.parent, output.name + ".partial")
    try:
        make_folder(output.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigError("output", output, f"cannot write there ({error.strerror}); choose another path") from error


@contextmanager
def disk_full_explained(output: Path) -> Iterator[None]:
    """Turn a full disk within the block into a `ConfigError` with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        remedy = "free some space and run the same command again; finished work is kept"
        raise ConfigError("output", output, f"the disk is full; {remedy}") from error


def publish(partial: Path, manifest: Manifest, output: Path) -> None:
    """Complete the store and rename it to `output`."""
    # The manifest first: if the program is killed from here on, the next one only has to rename.
    write_atomically(partial / MANIFEST, manifest.to_json().encode())
    shutil.rmtree(partial / UNITS, ignore_errors=True)
    for name in (REQUEST, LOCK):
        (partial / name).unlink(missing_ok=True)
    if output.exists():
        # A kill may have left an older copy there, over which a directory cannot be renamed.
        shutil.rmtree(_replaced(output), ignore_errors=True)
        os.rename(output, _replaced(output))
    move_store(partial, output)
    shutil.rmtree(_replaced(output), ignore_errors=True)


def _replaced(output: Path) -> Path:
    """Return the temporary name of a store while another one replaces it."""
    return output.with_name(output.name + ".replaced")


def _continues(partial: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    before = _earlier_settings(partial)
    if before is None or not _has_work(partial):
        return False
    differences = _differences(_NOT_RECORDED | before, _NOT_RECORDED | settings)
    if differences and not overwrite:
        raise ConfigError(
            "output",
            partial,
            f"half written with other settings ({'; '.join(differences)}); run the earlier command "
            "again to finish it, or set overwrite=true to start over",
        )
    return not differences


def _has_work(partial: Path) -> bool:
    """Return True if there is finished work that another command would have to discard."""
    units = (_own_record(unit).get("shards") for unit in (partial / UNITS).glob("*.json"))
    return (partial / MANIFEST).is_file() or any(units)


def _earlier_settings(partial: Path) -> dict[str, Any] | None:
    # A complete manifest means that only the rename is missing; publish has removed the request by then.
    if (partial / MANIFEST).is_file():
        return read_manifest(partial).settings
    if (partial / REQUEST).is_file():
        return _own_record(partial / REQUEST)
    return None


def _own_record(path: Path) -> dict[str, Any]:
    """Read a record that this program wrote in a partial directory; raise `ConfigError` if it is damaged."""
    try:
        content = read_json(path, within=path.parent)
    except BadFile as error:
        raise ConfigError(path, None, f"{error.reason}; remove the file and run the same command again") from error
    if not isinstance(content, dict):
        raise ConfigError(path, None, "damaged; remove the file and run the same command again")
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
