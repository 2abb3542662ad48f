"""Files and arguments from strangers, spoilt at random: read, or refused in one line; nothing else ever.

No traceback, no hang, no gigabyte, nothing of another folder read, no environment variable and no escape sequence
printed. `CLEX_TRAIN_STRANGERS=2000 pytest -m slow tests/strangers` tries as many, in a process of bounded memory.
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
def test_a_spoilt_file_or_argument_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    wrong = {seed: found for seed in range(SAMPLE[kind]) if (found := run_case(tmp_path, kind, seed))}
    assert wrong == {}


@pytest.mark.slow
def test_many_are_and_memory_stays_below_a_gigabyte(tmp_path: Path) -> None:
    count = int(os.environ.get("CLEX_TRAIN_STRANGERS", "400"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(tmp_path), str(count)]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20 * count, check=False
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


def main(folder: Path, count: int) -> int:
    """Try `count` cases, as many of each kind, with a gigabyte beside what importing took; returns how many failed."""
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
