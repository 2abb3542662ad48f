"""Sources of Python's standard library: about 10 MB of real text that every Python has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from clex_train.utils.errors import ConfigError

LEFT_OUT = frozenset(
    ("test", "tests", "encodings", "pydoc_data", "idlelib", "site-packages", "dist-packages", "__pycache__")
)
"""Directories to leave out at any depth: tests, tables, a program with its own texts, and third-party packages."""


def root() -> Path:
    """Return the directory of this Python's standard library, also from within a virtual environment."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules(library: Path | None = None) -> list[Path]:
    """List every nonempty module, sorted by its path within the library.

    Raises:
        ConfigError: there are no sources (some Pythons ship only compiled modules).
    """
    library = library or root()
    found = sorted(path for path in library.rglob("*.py") if _is_module(path, library))
    if not found:
        raise ConfigError("corpus.source", "stdlib", f"no .py files in {library}; use a Python that ships its sources")
    return found


def _is_module(path: Path, library: Path) -> bool:
    parts = path.relative_to(library).parts
    # _sysconfigdata contains the paths and compiler flags of one machine.
    own = not LEFT_OUT.intersection(parts) and not path.name.startswith("_sysconfigdata")
    return own and path.is_file() and path.read_bytes().strip() != b""
