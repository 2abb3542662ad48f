"""Find the text files in a folder by suffix, and log everything there that is not read in one line."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from clex_train.utils import log
from clex_train.utils.errors import ConfigError, InputError
from data_prep.config import Format
from data_prep.corpus.streams import compression

logger = log.get(__name__)

SUFFIXES = {
    ".jsonl": Format.jsonl,
    ".jsonlines": Format.jsonl,
    ".json": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".txt": Format.txt,
    ".text": Format.txt,
    ".md": Format.txt,
    ".parquet": Format.parquet,
}
MAX_KINDS = 12
"""Kinds of skipped files to name in the log line."""


def format_of(path: Path, format: Format) -> Format:
    """Return the format of a file: as configured, or by its suffix (any case), before a compression suffix if any.

    Raises:
        ConfigError: the suffix is unknown.
    """
    if format is not Format.auto:
        return format
    packed = compression(path)
    found = SUFFIXES.get(Path(path.name[: len(path.name) - len(packed)]).suffix.lower())
    if found is None:
        raise ConfigError("corpus.paths", path, "unknown suffix; set corpus.format to jsonl, txt or parquet")
    if found is Format.parquet and packed:
        raise ConfigError("corpus.paths", path, f"cannot read parquet through {packed}; decompress the file")
    return found


def texts_in(folder: Path, format: Format) -> list[Path]:
    """List the files of known format in a folder, recursively and sorted; log in one line what is left out.

    Raises:
        ConfigError: there is no such file; the message lists the others.
    """
    found: list[Path] = []
    left_out: dict[str, list[str]] = defaultdict(list)

    def unreadable(error: OSError) -> None:
        # os.walk ignores such errors by default, and the folder's documents would be missing without notice.
        left_out["unreadable folder"].append(os.path.relpath(str(error.filename), folder))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        below = Path(place).relative_to(folder)
        # Remove from the list in place: os.walk then does not descend. Covers .git and .cache of hub downloads.
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            left_out["hidden"].append(f"{below / name}/")
        for name in folders:
            # os.walk does not follow links, which may form a cycle.
            if os.path.islink(os.path.join(place, name)):
                left_out["link to a folder, name it in corpus.paths to read it"].append(str(below / name))
        for name in files:
            reason = _why_not(Path(place, name), format)
            if reason:
                left_out[reason].append(str(below / name))
            else:
                found.append(Path(place, name))
    if not found:
        there = f"; it has {_in_words(left_out)}" if left_out else ""
        raise ConfigError("corpus.paths", folder, f"no file of a known format in this directory{there}")
    if left_out:
        total = sum(map(len, left_out.values()))
        logger.warning(
            "corpus.paths=%s: %d files read, %d left out: %s", folder, len(found), total, _in_words(left_out)
        )
    return sorted(found)


def _why_not(file: Path, format: Format) -> str:
    """Return the reason why a file is left out; an empty string if it is read."""
    if file.name.startswith("."):
        return "hidden"
    if not os.path.isfile(file):
        return "broken link" if file.is_symlink() else "not a regular file"
    # .md is a text format, but the README of a data set is not part of it.
    if file.name == "README.md":
        return "README.md"
    try:
        format_of(file, format)
    except InputError:
        return _suffix(file) or "without a suffix"
    return ""


def _suffix(file: Path) -> str:
    packed = compression(file)
    return Path(file.name[: len(file.name) - len(packed)]).suffix.lower() + packed


def _in_words(left_out: dict[str, list[str]]) -> str:
    """Format skipped files as `2 .csv (a.csv, b.csv), 1 hidden (.cache/)`, the most frequent kinds first."""
    kinds = sorted(left_out.items(), key=lambda kind: -len(kind[1]))
    parts = []
    for kind, names in kinds[:MAX_KINDS]:
        some = ", ".join(sorted(names)[:2]) + (", ..." if len(names) > 2 else "")
        parts.append(f"{len(names)} {kind} ({some})")
    rest = sum(len(names) for _, names in kinds[MAX_KINDS:])
    return ", ".join(parts) + (f", {rest} of other kinds" if rest else "")
