"""`manifest.json`: what a checkpoint is, where its run stood, and what every file beside it must be.

The text must be byte for byte what `render` writes for its content, and it carries a SHA-256 of itself: whatever is
changed in it is noticed. Format 1 knew sizes only; such checkpoints can still be continued.
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
"""Bytes of a manifest that are read at most; a file of a checkpoint takes some 200."""
ONLY_SIZES = 1
ADDED_IN_2 = ("config_hash", "versions", "sha256", "checksum")


@dataclass(frozen=True)
class Manifest:
    """The run a checkpoint belongs to and where the run stood."""

    step: Count
    rows_consumed: Count
    world_size: Count
    zero_stage: Count
    architecture: str
    """Digest of the model's architecture; another one cannot be resumed."""
    data_fingerprint: str
    data_order: DataOrder = field(default_factory=dict)
    """Weights of the domains and rows left out, as `data.identity.data_order` records them."""
    files: dict[str, Count] = field(default_factory=dict)
    """Size in bytes of every file beside the manifest."""
    format: int = FORMAT
    config_hash: str = ""
    """SHA-256 of the whole configuration, to tell two checkpoints apart; changes are judged by the run folder."""
    versions: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    """Of every file beside the manifest, in hexadecimal, computed while it was written; empty in format 1."""
    checksum: str = ""
    """SHA-256 of the manifest with this field empty."""

    @classmethod
    def of_run(cls, config: Config, architecture: str, data_fingerprint: str) -> "Manifest":
        """The identity of a run before its first step."""
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
        """The text of the file."""
        unsigned = _json(asdict(replace(self, checksum="")))
        return _json(asdict(replace(self, checksum=hashlib.sha256(unsigned.encode()).hexdigest())))


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint whose files have the right sizes; contents are for `check_contents`.

    Raises `Damaged`, naming the file.
    """
    manifest = _parse(folder)
    if folder.name != f"step_{manifest.step}":
        raise Damaged(f"{MANIFEST} is that of step {manifest.step}")
    for name, size in manifest.files.items():
        checksums.check_size(folder, name, size, within=folder)
    return manifest


def check_contents(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Read some of a checkpoint's files and compare their SHA-256, where it is known.

    Raises `Damaged`, naming the file.
    """
    for name in [name for name in names if name in manifest.sha256]:
        checksums.check_content(folder, name, manifest.sha256[name], within=folder)


def check_compatible(path: Path, manifest: Manifest, expected: Manifest) -> None:
    """`ValueError` with the remedy when a checkpoint cannot be continued by this run. Another world size can."""
    remedies = {
        "architecture": "it holds a model of another architecture; choose another output_dir",
        "data_fingerprint": "it was trained on another token store; choose another output_dir",
        "zero_stage": f"it was written with engine.zero_stage={manifest.zero_stage}; use the same",
    }
    for name, remedy in remedies.items():
        if getattr(manifest, name) != getattr(expected, name):
            raise ConfigError(f"checkpoint {path}", None, remedy)
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
        said = parse_json(content, path)
        manifest = decode(said, Manifest, path)
        require_order(manifest.data_order, path)
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except BadFile as error:
        raise Damaged(f"{MANIFEST}: {error.reason}") from error
    if manifest.format not in (ONLY_SIZES, FORMAT):
        raise Damaged(f"{MANIFEST} has format {manifest.format!r}, this program reads up to {FORMAT}")
    old = manifest.format == ONLY_SIZES and not said.keys() & set(ADDED_IN_2)
    if content.decode("utf-8") != (_json(said) if old else manifest.render()):
        raise Damaged(f"{MANIFEST} is not as it was written")
    for name in {*manifest.files, *manifest.sha256}:
        if not is_plain_name(name):
            raise Damaged(f"{MANIFEST} names {name!r}, which is no file of its folder")
    return manifest


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _config_hash(config: Config) -> str:
    plain = json.dumps(asdict(config), sort_keys=True, default=_plain)
    return hashlib.sha256(plain.encode()).hexdigest()


def _plain(value: object) -> str:
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
