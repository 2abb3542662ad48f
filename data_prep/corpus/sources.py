"""Plan the reading of a corpus: cut it into pieces and group them into units of work, one shard each.

The plan depends only on the corpus and `shard_mb`. So the store does not depend on the number of workers, and finished
units are not repeated.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import is_lfs_pointer
from data_prep.config import CorpusConfig, CorpusSource, Format, OnBadRecord, require_corpus
from data_prep.corpus import hub, stdlib
from data_prep.corpus.folders import format_of, texts_in
from data_prep.corpus.streams import compression

logger = log.get(__name__)

MAX_HUB_UNITS = 1024
"""Shards of a hub data set at most; some have tens of thousands of files."""
MAX_UNIT_PIECES = 4096
"""Files per unit at most, so that a corpus of many small files still has units to distribute."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, or part `start` of `stop` of a hub data set; `format` selects the reader."""

    path: str
    format: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk; 0 if unknown."""
        return 0 if self.format == "hub" else self.stop - self.start


@dataclass(frozen=True)
class Unit:
    """Pieces of shard `index`; `first_source` is the number of pieces in earlier units."""

    index: int
    first_source: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """File name of its shards; sorts in order."""
        return f"{self.index:05d}"


def plan(corpus: CorpusConfig, shard_bytes: int) -> list[Unit]:
    """Return the units of a corpus, in order.

    Raises:
        ConfigError: there is nothing to read, or a file is missing, unreadable or of unknown format.
    """
    require_corpus(corpus)
    pieces = _PLANNERS[corpus.source](corpus, shard_bytes)
    if not pieces:
        raise ConfigError("corpus.paths", list(corpus.paths), "the corpus is empty, all files are empty")
    return _group(pieces, shard_bytes)


def _plan_files(corpus: CorpusConfig, shard_bytes: int) -> list[Piece]:
    files = {path: format_of(path, corpus.format) for path in expand(corpus.paths, corpus.format)}
    pieces, pointers, empty = [], [], []
    for path, format in files.items():
        # Check every file before any is read: a missing permission should not surface after hours.
        if not os.access(path, os.R_OK):
            raise ConfigError("corpus.paths", path, "not readable; check its permissions")
        size = path.stat().st_size
        if is_lfs_pointer(path):
            pointers.append(path)
        if not size:
            empty.append(path)
        pieces += _cut(path, format, size, shard_bytes)
    # After the loop, so that the message can say how many pointers there are.
    if pointers and corpus.on_bad_record is OnBadRecord.error:
        raise ConfigError("corpus.paths", pointers[0], _lfs_pointers(len(pointers)))
    if empty:
        logger.warning("%d files are empty, such as %s", len(empty), empty[0])
    return pieces


def _lfs_pointers(count: int) -> str:
    others = f", as are {count - 1} more" if count > 1 else ""
    return (
        f"a git-lfs pointer instead of the file itself{others}; run `git lfs pull`, or leave pointers out with "
        "corpus.on_bad_record=skip"
    )


def _plan_stdlib(corpus: CorpusConfig, shard_bytes: int) -> list[Piece]:
    return [Piece(str(path), Format.txt.name, 0, path.stat().st_size) for path in stdlib.modules()]


def _plan_hub(corpus: CorpusConfig, shard_bytes: int) -> list[Piece]:
    # Fewer parts than files: each part then streams several files in order.
    count = min(hub.num_shards(corpus), MAX_HUB_UNITS)
    return [Piece(str(corpus.hub), "hub", part, count) for part in range(count)]


_PLANNERS: dict[CorpusSource, Callable[[CorpusConfig, int], list[Piece]]] = {
    CorpusSource.files: _plan_files,
    CorpusSource.stdlib: _plan_stdlib,
    CorpusSource.hub: _plan_hub,
}


def expand(paths: Iterable[str], format: Format) -> list[Path]:
    """Expand files, directories and globs to a list of distinct files: in the given order, sorted within an entry."""
    files: dict[Path, None] = {}
    for entry in paths:
        try:
            found = _expand_entry(os.path.expanduser(entry), format)
        except PermissionError as error:
            raise ConfigError("corpus.paths", entry, "not readable; check the permissions of its folders") from error
        for path in found:
            if path in files:
                logger.warning("corpus.paths names %s twice; it is read once", path)
            files[path] = None
    return list(files)


def _expand_entry(entry: str, format: Format) -> list[Path]:
    path = Path(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        return texts_in(path, format)
    matches = sorted(map(Path, glob.glob(entry, recursive=True)))
    found = [match for match in matches if match.is_file()]
    if not found:
        kind = f"matches only folders, such as {matches[0]}; end it with /**" if matches else _nothing_there(path)
        raise ConfigError("corpus.paths", entry, kind)
    # A pattern with ** matches folders by design, so only others deserve a warning.
    others = [match for match in matches if not match.is_file()]
    if others and "**" not in Path(entry).parts:
        logger.warning("corpus.paths=%s: left out %d matches that are not files: %s", entry, len(others), _some(others))
    return found


def _nothing_there(path: Path) -> str:
    return "a broken link" if path.is_symlink() else "no such file, directory or glob"


def _some(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def _cut(path: Path, format: Format, size: int, shard_bytes: int) -> list[Piece]:
    """Cut an uncompressed .jsonl file every `shard_bytes`; other files are one piece each."""
    # A line belongs to the piece in which it begins. Compressed streams cannot be entered in the middle.
    step = size
    if format is Format.jsonl and not compression(path):
        step = shard_bytes
    return [
        Piece(str(path), format.name, start, min(start + step, size)) for start in range(0, size, step or 1) if size
    ]


def _group(pieces: list[Piece], shard_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    group: list[Piece] = []
    for i, piece in enumerate(pieces):
        group.append(piece)
        # A hub part is a unit of its own, because its size is unknown before it is read.
        full = sum(p.num_bytes for p in group) >= shard_bytes or len(group) >= MAX_UNIT_PIECES
        if full or piece.format == "hub" or i == len(pieces) - 1:
            units.append(Unit(len(units), i + 1 - len(group), tuple(group)))
            group = []
    return units
