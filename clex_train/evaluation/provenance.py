"""Where an evaluation's numbers come from: command, weights, data, versions. Enough to repeat it or to doubt it."""

import hashlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from clex_train.data.store import TokenStore
from clex_train.evaluation.results import Origin
from clex_train.tracking import tracker
from clex_train.utils import distributed

WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "clex.json")
BLOCK = 2**24


def describe(label: str, weights: dict[str, Any], store: TokenStore, dtype: torch.dtype) -> Origin:
    """The origin of an evaluation by this process; `weights` says which (path, hash, step)."""
    return Origin(
        label=label,
        command=command(),
        model=weights,
        data={"path": str(store.path), "fingerprint": store.fingerprint},
        environment=environment(dtype),
    )


def command() -> list[str]:
    """This process's command line, the interpreter by its name."""
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """Commit, versions, device, dtype and number of ranks."""
    return {
        "git_commit": tracker.git_commit(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": distributed.world_size(),
    }


def weights_hash(directory: Path) -> str | None:
    """16 hex digits over names and contents of a model directory's weights and settings; None for a hub name."""
    return files_hash(directory, WEIGHT_FILES) if directory.is_dir() else None


def files_hash(directory: Path, patterns: Iterable[str]) -> str:
    """16 hex digits over names and contents of a directory's files of these patterns."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(found for pattern in patterns for found in directory.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
