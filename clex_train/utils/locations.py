"""Paths of the program's own files: `conf/`, `train.py` and the record of the commit.

checkout, its snapshot, editable install    ROOT is the folder that holds `clex_train/`, `train.py` and `conf/`
installed wheel                             ROOT is `clex_train/shipped/`, where `pyproject.toml` puts them
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "shipped"
"""Exists in a wheel only; the build copies `train.py`, `conf/` and the commit into it."""

IS_CHECKOUT = not SHIPPED.is_dir()
ROOT = PACKAGE.parent if IS_CHECKOUT else SHIPPED
CONF = ROOT / "conf"
TRAIN = ROOT / "train.py"
COMMIT = ROOT / "COMMIT"
"""The commit of a copy that git does not know: a wheel, or the snapshot of a SLURM job."""
