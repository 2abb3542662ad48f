"""The environment of a launch: command, commit, versions and machine."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clex_train.utils import distributed, files, locations

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "torchdiffeq", "hydra-core", "flash-attn")


def write_environment(run_dir: Path, first_step: int, data_fingerprint: str) -> None:
    """Write environment.json, or environment_step_<N>.json when resuming at step N.

    Contents: command, commit, versions, machine and data fingerprint.
    """
    facts = {
        # As typed: console.run has rewritten sys.argv, where values are quoted for Hydra.
        "command": [sys.executable, *sys.orig_argv[1:]],
        "git_commit": git_commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "world_size": distributed.world_size(),
        "data_fingerprint": data_fingerprint,
    }
    name = f"environment_step_{first_step}.json" if first_step else "environment.json"
    files.write_atomically(run_dir / name, json.dumps(facts, indent=2) + "\n")


def git_commit() -> str | None:
    """Return the commit of the running code, with `-dirty` if files differ from it; None if unknown."""
    # A wheel and a snapshot for a SLURM job have no .git but a file with the commit.
    if locations.COMMIT.exists():
        return locations.COMMIT.read_text(encoding="utf-8").strip() or None
    if not locations.IS_CHECKOUT:
        # git would search the parent folders, and could name a commit of an unrelated repository.
        return None
    try:
        described = subprocess.run(
            # `--exclude=*` ignores tags, so that this is always the bare hash.
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=locations.ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
