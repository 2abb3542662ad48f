"""The sources of Python's standard library: about 10 MB of real text that is wherever Python is."""

from __future__ import annotations

import sysconfig
from pathlib import Path

LEFT_OUT = frozenset(
    ("test", "tests", "encodings", "pydoc_data", "idlelib", "site-packages", "dist-packages", "__pycache__")
)
"""Directories left out at any depth: tests, tables, a program with its own texts, and what is not the library."""


def root() -> Path:
    """The directory of this Python's standard library, also inside a virtual environment."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules(library: Path | None = None) -> list[Path]:
    """Every module with something in it, sorted by its path within the library.

    Raises:
        ValueError: no sources there (a Python that ships compiled modules only).
    """
    library = library or root()
    found = sorted(path for path in library.rglob("*.py") if _is_module(path, library))
    if not found:
        raise ValueError(f"corpus.source=stdlib: no .py files in {library}; use a Python that ships its sources")
    return found


def _is_module(path: Path, library: Path) -> bool:
    parts = path.relative_to(library).parts
    # _sysconfigdata holds the paths and compiler flags of one machine.
    own = not LEFT_OUT.intersection(parts) and not path.name.startswith("_sysconfigdata")
    return own and path.is_file() and path.read_bytes().strip() != b""
