"""Provenance of an evaluation: command, weights, data and versions, enough to repeat it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clex_train.evaluation.results import Origin
from clex_train.tracking.environment import git_commit
from clex_train.utils import distributed

if TYPE_CHECKING:
    from clex_train.token_store.store import TokenStore

WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "clex.json")
BLOCK = 2**24
"""Bytes hashed at a time."""


def describe(label: str, weights: dict[str, Any], store: TokenStore, dtype: torch.dtype) -> Origin:
    """Describe the origin of an evaluation by this process; `weights` has path, hash and step."""
    return Origin(
        label=label,
        command=command(),
        model=weights,
        data={"path": str(store.path), "fingerprint": store.fingerprint},
        environment=environment(dtype),
    )


def command() -> list[str]:
    """Return this process's command line, without the path of the interpreter."""
    # `orig_argv`: console.run rewrites `sys.argv`, and `python -m` is missing from it.
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """Collect commit, versions, device, dtype and number of ranks."""
    return {
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": distributed.world_size(),
    }


def weights_hash(directory: Path) -> str | None:
    """Hash a model directory's weights and settings to 16 hex digits; None for a hub name."""
    # Contents and not modification times: a copied directory must give the same hash.
    return files_hash(directory, WEIGHT_FILES) if directory.is_dir() else None


def files_hash(directory: Path, patterns: Iterable[str]) -> str:
    """Hash names and contents of a directory's files with these patterns to 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    # Sorted: the order of glob depends on the file system.
    for path in sorted(found for pattern in patterns for found in directory.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
