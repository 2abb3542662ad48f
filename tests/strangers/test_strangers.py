"""Untrusted files and arguments, corrupted at random: read, or refused in one line.

No case may cause a traceback, a hang, a gigabyte of memory or a read outside its folder, or print an environment
variable or an escape sequence. `CLEX_TRAIN_STRANGERS=2000 pytest -m slow tests/strangers` sets the number of cases.
"""

import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.strangers.stranger_cases import KINDS, prepare, run_case

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = {
    "store": 20, "checkpoint": 16, "record": 10, "config": 12, "model": 16, "report": 10, "unit": 6, "override": 12,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_file_or_argument_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    wrong = {seed: found for seed in range(SAMPLE[kind]) if (found := run_case(tmp_path, kind, seed))}
    assert wrong == {}


@pytest.mark.slow
def test_many_corrupted_inputs_stay_below_a_gigabyte_of_memory(tmp_path: Path) -> None:
    count = int(os.environ.get("CLEX_TRAIN_STRANGERS", "400"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(tmp_path), str(count)]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20 * count, check=False
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


def main(folder: Path, count: int) -> int:
    """Try `count` cases, equally many of each kind, in a gigabyte above imports; return the number of failures."""
    prepare(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    failed = Counter[str]()
    each = -(-count // len(KINDS))
    for kind in KINDS:
        for seed in range(1000, 1000 + each):
            if found := run_case(folder, kind, seed):
                failed[kind] += 1
                print(f"{kind} {seed}: {found}\n", flush=True)
        print(f"{kind}: {each - failed[kind]} of {each} as wanted", flush=True)
    return min(failed.total(), 100)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
