"""`manifest.json` of a checkpoint: the run it belongs to, the step, and size and SHA-256 of every other file.

The text must match what `render` writes byte for byte, and it carries a SHA-256 of itself, so any edit is detected.
Format 1 recorded sizes only; runs still resume from it.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clex_train.config.root import Config
from clex_train.data.identity import DataOrder, consumed_order, data_order, require_order
from clex_train.utils import checksums, distributed, versions
from clex_train.utils.checksums import Damaged
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import BadFile, is_plain_name, read_regular
from clex_train.utils.records import Count, decode, parse_json

FORMAT = 2
MANIFEST = "manifest.json"
LARGEST = 2**22
"""Largest manifest that is read, in bytes. Each file of a checkpoint adds about 200."""
ONLY_SIZES = 1
"""The format without digests."""
ADDED_IN_2 = ("config_hash", "versions", "sha256", "checksum")


@dataclass(frozen=True)
class Manifest:
    """Identity of a run and its position in the data when the checkpoint was taken."""

    step: Count
    rows_consumed: Count
    world_size: Count
    zero_stage: Count
    architecture: str
    """Digest of the model's architecture and adapter. A run with another cannot resume from this checkpoint."""
    data_fingerprint: str
    data_order: DataOrder = field(default_factory=dict)
    """Domain weights and skipped rows, in the form of `data.identity.data_order`."""
    files: dict[str, Count] = field(default_factory=dict)
    """File name to size in bytes, for every file except the manifest."""
    format: int = FORMAT
    config_hash: str = ""
    """SHA-256 of the whole configuration. Informative only: the run folder decides which changes may resume."""
    versions: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    """File name to hexadecimal SHA-256, computed during the write; empty in format 1."""
    checksum: str = ""
    """SHA-256 of the manifest with this field empty."""

    @classmethod
    def from_config(cls, config: Config, architecture: str, data_fingerprint: str) -> "Manifest":
        """Describe a run before its first step."""
        return cls(
            0,
            0,
            distributed.world_size(),
            config.engine.zero_stage,
            architecture,
            data_fingerprint,
            data_order(config.data, config.optim.batch_rows),
            config_hash=_config_hash(config),
            versions=_versions(),
        )

    def render(self) -> str:
        """Return the text of the file, checksum included."""
        # A digest cannot cover itself, so it is taken over the same text with an empty checksum.
        unsigned = _json(asdict(replace(self, checksum="")))
        return _json(asdict(replace(self, checksum=hashlib.sha256(unsigned.encode()).hexdigest())))


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare the sizes of its files.

    Raises `Damaged`, which names the file.
    """
    manifest = _parse(folder)
    # A folder copied or renamed by hand would resume at a step that its name does not show.
    if folder.name != f"step_{manifest.step}":
        raise Damaged(f"{MANIFEST} belongs to step {manifest.step}")
    # Sizes only: every rank calls this at start, and hashing terabytes on each would take hours.
    for name, size in manifest.files.items():
        checksums.check_size(folder, name, size, within=folder)
    return manifest


def check_contents(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Hash some of a checkpoint's files and compare. Raises `Damaged`, which names the file."""
    # Format 1 has no digests, so its files pass unhashed.
    for name in [name for name in names if name in manifest.sha256]:
        checksums.check_content(folder, name, manifest.sha256[name], within=folder)


def check_compatible(path: Path, manifest: Manifest, expected: Manifest) -> None:
    """Raise `ConfigError` with the remedy when this run cannot resume from a checkpoint.

    The world size may differ: such checkpoints are converted.
    """
    remedies = {
        "architecture": "it holds a model of another architecture or adapter; choose another output_dir",
        "data_fingerprint": "it was trained on another token store; choose another output_dir",
        "zero_stage": f"it was written with engine.zero_stage={manifest.zero_stage}; use the same",
    }
    for name, remedy in remedies.items():
        if getattr(manifest, name) != getattr(expected, name):
            raise ConfigError(f"checkpoint {path}", None, remedy)
    # Weights and skipped rows may change for data still to come, never for rows already read: the order is a pure
    # function of them, and a retroactive change would repeat some rows and drop others.
    before, now = (consumed_order(m.data_order, manifest.rows_consumed) for m in (manifest, expected))
    for name in before:
        if before[name] != now[name]:
            raise ConfigError(
                f"data.{name}",
                None,
                f"checkpoint {path} has read {manifest.rows_consumed} rows under {before[name]}, which "
                f"would have been {now[name]}; change only what comes after, or choose another output_dir",
            )


def _parse(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = read_regular(path, within=folder, most=LARGEST)
        values = parse_json(content, path)
        manifest = decode(values, Manifest, path)
        require_order(manifest.data_order, path)
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except BadFile as error:
        raise Damaged(f"{MANIFEST}: {error.reason}") from error
    if manifest.format not in (ONLY_SIZES, FORMAT):
        raise Damaged(f"{MANIFEST} has format {manifest.format!r}, this program reads up to {FORMAT}")
    # Without the second condition, setting `format` to 1 by hand would switch off the digests.
    old = manifest.format == ONLY_SIZES and not values.keys() & set(ADDED_IN_2)
    if content.decode("utf-8") != (_json(values) if old else manifest.render()):
        raise Damaged(f"{MANIFEST} was changed after it was written")
    # A name such as ../../x would make the checks read outside the checkpoint.
    for name in {*manifest.files, *manifest.sha256}:
        if not is_plain_name(name):
            raise Damaged(f"{MANIFEST} names {name!r}, which is not a file of its folder")
    return manifest


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _config_hash(config: Config) -> str:
    plain = json.dumps(asdict(config), sort_keys=True, default=_plain)
    return hashlib.sha256(plain.encode()).hexdigest()


def _plain(value: object) -> str:
    # Configuration files contain the name.
    return value.name if isinstance(value, Enum) else str(value)


@cache
def _versions() -> dict[str, str]:
    found = {versions.OWN: versions.own(), "python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
