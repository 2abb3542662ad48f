"""A copy of the code as it is now, so that a job that waits or is requeued runs what was submitted."""

import shutil
import subprocess
from pathlib import Path

from clex_train.tracking import git_commit

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train.py", "clex_train", "conf", "data_prep", "launch", "pyproject.toml", "requirements.txt")
"""What is copied where there is no git to ask."""


def copy_code(target: Path) -> None:
    """Copy the files that git knows or would add, or `PARTS` without git, and write the commit beside them."""
    target.mkdir(parents=True)
    for name in _known_to_git() or _of_parts():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    (target / "COMMIT").write_text(f"{git_commit() or ''}\n", encoding="utf-8")


def _known_to_git() -> list[str]:
    """Tracked files and those that are neither tracked nor ignored; empty where this is no checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        return []
    names = [name for name in dict.fromkeys(listed.split("\0")) if name and (ROOT / name).is_file()]
    return names if "train.py" in names else []


def _of_parts() -> list[str]:
    files = [file for part in PARTS for file in ((ROOT / part).rglob("*") if (ROOT / part).is_dir() else [ROOT / part])]
    return [str(file.relative_to(ROOT)) for file in files if file.is_file() and "__pycache__" not in file.parts]
