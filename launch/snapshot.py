"""Copy the code at submission, so that a job that waits or is requeued runs what was submitted.

Copies the files that git tracks, and small new source files at the top or in the code directories. Data and secrets in
the checkout are left out, and a log line names them.
"""

import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

from clex_train.tracking.environment import git_commit
from clex_train.utils import log
from clex_train.utils.locations import PACKAGE, ROOT, SHIPPED

PARTS = ("train.py", "clex_train", "conf", "data_prep", "launch", "pyproject.toml", "requirements.txt")
"""Files to copy without git, and the directories from which new files are copied."""
SOURCES = {".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".txt", ".md", ".sh", ".cu", ".cpp", ".h", ".jinja"}
SECRETS = (".env", ".env.*", "*.env", ".netrc", "_netrc", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "credentials*")
MOST_BYTES = 2**20
"""Largest new file to copy, in bytes; larger ones are data."""
NAMED = 5
"""Files to name in the log line."""

logger = log.get(__name__)


def copy_code(target: Path) -> None:
    """Copy the code, write the commit next to it, and log in one line which files are left out."""
    target.mkdir(parents=True)
    # Tracked files are copied at any size: the repository contains test data that imports may read.
    tracked, others = _known_to_git() or ([], _list_parts())
    new = [name for name in others if _is_small_source(name)]
    copied = [name for name in (*tracked, *new) if not _may_be_secret(name)]
    for name in copied:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_source(name), copy)
    (target / "COMMIT").write_text(f"{git_commit() or ''}\n", encoding="utf-8")
    _warn_about_left_out([name for name in (*tracked, *others) if name not in set(copied)])


def _warn_about_left_out(names: list[str]) -> None:
    if not names:
        return
    size = sum(_source(name).stat().st_size for name in names) / 1e6
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    logger.warning(
        "left out of the copy of the code: %s%s (%d files, %.1f MB; secrets, data, or outside the code directories); "
        "the job does not see them",
        ", ".join(names[:NAMED]),
        more,
        len(names),
        size,
    )


def _is_small_source(name: str) -> bool:
    path = Path(name)
    is_place = len(path.parts) == 1 or path.parts[0] in PARTS
    is_source = path.suffix in SOURCES or path.name == ".gitignore"
    return is_place and is_source and _source(name).stat().st_size <= MOST_BYTES


def _may_be_secret(name: str) -> bool:
    return any(fnmatch(Path(name).name, pattern) for pattern in SECRETS)


def _known_to_git() -> tuple[list[str], list[str]] | None:
    """List the tracked files, and those neither tracked nor ignored; None outside a checkout."""
    tracked, new = (_listed(kind) for kind in (["--cached"], ["--others", "--exclude-standard"]))
    # Installed below an unrelated repository, git answers for that one.
    return (tracked, new) if "train.py" in tracked else None


def _listed(kind: list[str]) -> list[str]:
    # -z: file names with special characters would be quoted.
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *kind]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in dict.fromkeys(listed.split("\0")) if name and (ROOT / name).is_file()]


def _list_parts() -> list[str]:
    """List the files of the code where there is no git: in a copy of a checkout, or in an installed package."""
    places = [_source(part) for part in PARTS]
    files = [(place, file) for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return [
        str(file.relative_to(place.parent))
        for place, file in files
        if file.is_file() and "__pycache__" not in file.parts and not (place == PACKAGE and SHIPPED in file.parents)
    ]


def _source(name: str) -> Path:
    """Return the source file or folder of a name in the copy; a wheel has `train.py` and `conf/` elsewhere."""
    own = ROOT / name
    return own if own.exists() else PACKAGE.parent / name
