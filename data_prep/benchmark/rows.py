"""Rows of published files: JSON lines, JSON arrays and parquet, in folders and zip archives."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from clex_train.utils.errors import ConfigError, first_line, require

SUFFIXES = (".jsonl", ".json", ".parquet")
CUT = "the file is damaged or cut short; download it again"

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """A file of rows, on disk or in an archive."""

    name: str
    """Path for messages; a member of an archive follows the archive's name."""
    content: Callable[[], bytes]

    @property
    def parts(self) -> tuple[str, ...]:
        """Return folders and name of the file."""
        return Path(self.name).parts

    @property
    def stem(self) -> str:
        """Return the name without suffix, and without the numbers of a parquet file of the hub."""
        return Path(self.name).stem.split("-00000-of-")[0]

    def rows(self) -> list[Row]:
        """Read all rows; `ConfigError` names the file, and the line, that cannot be read."""
        suffix = Path(self.name).suffix
        content = self.content()
        if suffix == ".parquet":
            found: Any = self._parquet(content)
        elif suffix == ".jsonl" or content.lstrip()[:1] != b"[":
            # RULER and others write JSON lines under the suffix .json too.
            found = list(self._lines(content))
        else:
            found = self._parsed(content, "")
        good = isinstance(found, list) and all(isinstance(row, dict) for row in found)
        require(good and len(found) > 0, self.name, None, "holds no rows")
        return list(found)

    def _lines(self, content: bytes) -> Iterator[Any]:
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield self._parsed(line, f" in line {number}")

    def _parsed(self, content: bytes, where: str) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConfigError(self.name, None, f"not JSON{where} ({first_line(error)}): {CUT}") from error

    def _parquet(self, content: bytes) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(BytesIO(content)).to_pylist()
        except (OSError, ValueError) as error:
            raise ConfigError(self.name, None, f"not parquet ({first_line(error)}): {CUT}") from error


def find(paths: Iterable[str]) -> list[RowFile]:
    """List the files of rows at these places, in the order of their names; `ConfigError` for a place without any."""
    found: list[RowFile] = []
    for path in map(Path, paths):
        require(path.exists(), "paths", path, "no such file or folder; name what you downloaded")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [each for one in inside if one.is_file() for each in _files(one)]
        require(len(files) > 0, "paths", path, "no .jsonl, .json or .parquet file, and no .zip with one")
        found += files
    return found


def _files(path: Path) -> list[RowFile]:
    if path.suffix == ".zip":
        return _members(path)
    return [RowFile(str(path), path.read_bytes)] if path.suffix in SUFFIXES else []


def _members(path: Path) -> list[RowFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(SUFFIXES)]
    except zipfile.BadZipFile as error:
        raise ConfigError(path, None, f"not a zip archive ({first_line(error)}): {CUT}") from error
    # Archives made on a Mac hold a shadow of each file.
    names = [name for name in sorted(names) if not name.startswith("__MACOSX")]
    return [RowFile(f"{path}/{name}", partial(_member, path, name)) for name in names]


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ConfigError(f"{path}/{name}", None, f"cannot be read ({first_line(error)}): {CUT}") from error


def require_columns(file: RowFile, rows: Sequence[Row], needed: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a row that lacks a column, or has one that the published files do not have."""
    needed, known = set(needed), {*needed, *known}
    for number, row in enumerate(rows, 1):
        if missing := sorted(needed - row.keys()):
            remedy = f"row {number} has no {', '.join(missing)}; is it the published file of this benchmark?"
            raise ConfigError(file.name, None, remedy)
        if unknown := sorted(row.keys() - known):
            remedy = f"row {number} has unknown columns {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            raise ConfigError(file.name, None, remedy)


def require_text(file: RowFile, rows: Sequence[Row], columns: Iterable[str]) -> None:
    """Raise `ConfigError` for a row whose columns are not text."""
    for number, row in enumerate(rows, 1):
        for column in columns:
            good = isinstance(row[column], str)
            require(good, file.name, None, f"{column} of row {number} is {type(row[column]).__name__}, not text")


def require_texts(file: RowFile, rows: Sequence[Row], column: str) -> None:
    """Raise `ConfigError` for a row whose column is not a list of at least one text."""
    for number, row in enumerate(rows, 1):
        value = row[column]
        good = isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)
        require(good, file.name, None, f"{column} of row {number} is not a list of one text or more")
