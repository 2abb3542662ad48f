"""Checkpoints on disk: list those of a run folder, and find damage in their files."""

from dataclasses import dataclass
from pathlib import Path

from clex_train.checkpoint import manifest, safe_load
from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.safe_load import RunsCode, tensors_only
from clex_train.tracking.saved_config import CONFIG
from clex_train.utils import files
from clex_train.utils.checksums import Damaged
from clex_train.utils.files import BadFile

MOST_DIGITS = 18
"""Longest step number, in digits; Python refuses to parse integers of more than 4,300."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files have the sizes of its manifest."""

    path: Path
    manifest: Manifest

    def config(self) -> Path | None:
        """Return the path of its copy of the run's configuration, or None if missing or damaged."""
        # Checkpoints of earlier versions have no copy, and no digest of one.
        try:
            whole = files.sha256(self.path / CONFIG, within=self.path) == self.manifest.sha256.get(CONFIG)
        except (OSError, BadFile):
            return None
        return self.path / CONFIG if whole else None


def list_checkpoints(folder: Path) -> tuple[list[Found], dict[Path, str]]:
    """List the checkpoints with files of the right sizes, and the damage of the others by path. Not collective."""
    # Any other name, such as saving_step_<N>, is an unfinished save and no checkpoint.
    good, damage = [], {}
    for path in folder.glob("step_*"):
        try:
            good.append(Found(path, manifest.read(path)))
        except Damaged as damaged:
            damage[path] = str(damaged)
    return good, damage


def damage_in(found: Found, names: list[str]) -> str | RunsCode | None:
    """Return what is wrong with some files of a checkpoint, or None."""
    # Hash before unpickling: a damaged file is reported as damaged, without running its bytes through the unpickler.
    try:
        manifest.check_contents(found.path, found.manifest, names)
        with tensors_only(found.path):
            reasons = [safe_load.check(found.path / name) for name in names if name.endswith(".pt")]
    except Damaged as damaged:
        return str(damaged)
    except RunsCode as refusal:
        return refusal
    return next((reason for reason in reasons if reason is not None), None)


def step_of(path: Path) -> int:
    """Parse the step from a checkpoint's name; an unreadable one counts as newest, so that its damage is reported."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() and len(digits) <= MOST_DIGITS else 2**62
