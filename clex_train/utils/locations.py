"""Paths of the program's own files: `conf/`, `train.py` and the recorded commit.

checkout, snapshot, editable install    ROOT is the folder of `clex_train/`, `train.py` and `conf/`
installed wheel                         ROOT is `clex_train/shipped/`, filled by the build (pyproject.toml)
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "shipped"
"""Exists in an installed wheel only; the build copies `train.py`, `conf/` and the commit into it."""

# Decided by the files next to this code, so a checkout never reads those of an installed wheel.
IS_CHECKOUT = not SHIPPED.is_dir()
ROOT = PACKAGE.parent if IS_CHECKOUT else SHIPPED
CONF = ROOT / "conf"
TRAIN = ROOT / "train.py"
COMMIT = ROOT / "COMMIT"
"""File with the commit of a copy without git history: a wheel, or the snapshot of a SLURM job."""
