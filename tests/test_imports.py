"""Import contracts between packages, as part of the test suite as well as of `make check`."""

import subprocess
import sys
from pathlib import Path


def test_every_import_contract_is_kept():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
