"""Hooks for hatchling: dependencies from the requirements files, and the commit that a distribution was built from."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

EXTRAS = {
    "adapters": ["requirements-adapters.txt"],
    "gpu": ["requirements-gpu.txt"],
    "eval": ["requirements-eval.txt"],
    "dev": ["requirements-dev.txt", "requirements-docs.txt", "requirements-adapters.txt", "requirements-export.txt"],
    "export": ["requirements-export.txt"],
    "tracking": ["requirements-tracking.txt"],
}


class Requirements(MetadataHookInterface):
    """Take dependencies and extras from the files that `pip install -r` and the Makefile read."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the dynamic fields of `[project]`."""
        root = Path(self.root)
        metadata["dependencies"] = requirements(root / "requirements.txt")
        metadata["optional-dependencies"] = {
            extra: [line for name in names for line in requirements(root / name)] for extra, names in EXTRAS.items()
        }


class Commit(BuildHookInterface):
    """Write the commit into the distribution, because an installed package has no git to ask."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file `COMMIT` where `clex_train.utils.locations` looks for it."""
        # An editable install runs the checkout itself, whose commit changes after the build.
        if version == "editable":
            return
        root = Path(self.root)
        place = "clex_train/shipped/COMMIT" if self.target_name == "wheel" else "COMMIT"
        record = Path(tempfile.mkdtemp()) / "COMMIT"
        record.write_text(f"{commit(root)}\n", encoding="utf-8")
        build_data["force_include"][str(record)] = place


def requirements(file: Path) -> list[str]:
    """Return the requirements of a file without comments and without the files that it includes."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-r")]


def commit(root: Path) -> str:
    """Return the commit of a checkout, `-dirty` if files differ, or the one a source distribution recorded."""
    record = root / "COMMIT"
    if record.is_file():
        return record.read_text(encoding="utf-8").strip()
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
