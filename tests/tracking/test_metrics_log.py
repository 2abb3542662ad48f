"""Reading and truncating metrics.jsonl: only damaged lines are lost."""

import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from clex_train.tracking import metrics_log
from clex_train.tracking.metrics_log import MetricsLog

LINES = [json.dumps({"step": step, "loss": 1.5, "rows": [[step, step]]}).encode() + b"\n" for step in range(1, 9)]


def cut_back(path: Path, step: int) -> list[dict]:
    """Truncate the log after `step` and return the rows seen."""
    rows: list[dict] = []
    metrics_log.cut_back(path, step, rows.append)
    return rows


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 3, "lo',
        b"\0" * 40,
        b'{"step": 3, "loss"\xba 1.5}',
        b'{"stap": 3, "loss": 1.5}',
        b'{"step": "3"}',
        b'{"step": true}',
        b"[3]",
        b"3",
        b"",
        b"[" * 100_000,
        b'{"step": ' + b"9" * 10_000 + b"}",
    ],
    ids=["cut", "zeros", "no UTF-8", "no step", "text", "bool", "list", "number", "empty", "deep", "long number"],
)
@pytest.mark.parametrize("place", [0, 2, 8])
def test_an_unreadable_line_is_moved_and_reported_in_one_line(tmp_path, caplog, bad, place):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*LINES[:place], bad + b"\n", *LINES[place:]]))
    rows = cut_back(path, 6)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes() == b"".join(LINES[:6])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == bad + b"\n"
    (said,) = [record.message for record in caplog.records]
    assert said == f"{path}: unreadable lines moved to metrics.jsonl.damaged: 1"


def test_a_file_larger_than_the_disk_is_moved_instead_of_copied(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES))
    os.truncate(path, 2**40)
    MetricsLog(path, 6, lambda row: None).close()
    assert path.read_bytes() == b""
    assert (tmp_path / "metrics.jsonl.damaged").stat().st_size == 2**40
    (said,) = [record.message for record in caplog.records]
    assert said == (
        f"{path}: more than 256 MiB of it cannot be read; moved to metrics.jsonl.damaged, starting a new file"
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.damaged"])
@pytest.mark.parametrize("place", ["pipe", "link", "dangling"])
def test_a_log_that_is_a_pipe_or_a_link_outside_is_moved_unread(tmp_path, caplog, name, place):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_bytes(LINES[0])
    (run / "metrics.jsonl").write_bytes(b"no row\n")
    (run / name).unlink(missing_ok=True)
    if place == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(outside if place == "link" else tmp_path / "nothing")
    MetricsLog(run / "metrics.jsonl", 6, lambda row: None).close()
    assert caplog.records[0].message.endswith(f"; moved to {name}.damaged, starting a new file")
    assert (run / "metrics.jsonl").read_bytes() == b""
    assert outside.read_bytes() == LINES[0]
    assert not (tmp_path / "nothing").exists()


def test_an_unterminated_last_line_is_moved_even_if_it_parses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + LINES[1].rstrip(b"\n"))
    cut_back(path, 6)
    assert path.read_bytes() == LINES[0]
    log = MetricsLog(path, 6, lambda row: None)
    log.append({"step": 2})
    log.close()
    assert path.read_bytes() == LINES[0] + b'{"step": 2}\n'


def _fuzzed(rng: random.Random) -> bytes:
    content = bytearray(b"".join(LINES))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at : at + rng.randrange(60)]
            case 2:
                content[at:at] = rng.randbytes(rng.randrange(60))
            case _:
                content[at:] = b"\0" * (len(content) - at)
    return bytes(content)


def test_fuzzed_logs_stop_no_run_and_every_byte_is_kept_or_moved(tmp_path: Path):
    rng = random.Random(0)
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    for _ in range(1000):
        content = _fuzzed(rng)
        path.write_bytes(content)
        aside.unlink(missing_ok=True)
        rows = cut_back(path, 10**30)
        kept, damaged = path.read_bytes(), aside.read_bytes() if aside.exists() else b""
        assert [json.loads(line) for line in kept.splitlines()] == rows
        assert sorted((kept + damaged).split(b"\n")) == sorted(
            (content + b"\n" * (not content.endswith(b"\n"))).split(b"\n")
        )
        assert cut_back(path, 10**30) == rows


def test_an_intact_log_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES))
    before = path.stat()
    cut_back(path, 8)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_oversized_line_is_moved_completely_even_if_its_end_parses(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "LONGEST_LINE", 64)
    path = tmp_path / "metrics.jsonl"
    long = b"x" * 128 + LINES[4]
    path.write_bytes(LINES[0] + long + LINES[1])
    assert [row["step"] for row in cut_back(path, 8)] == [1, 2]
    assert path.read_bytes() == LINES[0] + LINES[1]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == long


@pytest.mark.parametrize("damage", [b"", b"no row\n", b"\0" * 2**20], ids=["whole", "a bad line", "zeros"])
def test_a_long_log_is_truncated_in_little_memory(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(metrics_log, "LONGEST_LINE", 2**14)
    path, count = tmp_path / "metrics.jsonl", 20_000
    with path.open("wb") as file:
        file.writelines(b'{"step": %d, "loss": 1.5, "rows": [[0, 7], [9, 11]]}\n' % step for step in range(count))
        file.write(damage)
    steps: set[int] = set()
    tracemalloc.start()
    metrics_log.cut_back(path, count // 2, lambda row: steps.add(row["step"] // 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18
    assert steps == set(range(11))
    assert path.read_bytes().count(b"\n") == count // 2 + 1
    aside = tmp_path / "metrics.jsonl.damaged"
    assert (aside.read_bytes().rstrip(b"\n") if damage else b"") == damage.rstrip(b"\n")
