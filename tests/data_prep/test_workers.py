"""Worker processes of data_prep end with the program that started them, even if it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
if __name__ == "__main__":
    from clex_train.resilience import stop_requests
    stop_requests.end_on_signals()
from clex_train.console import program as console
from data_prep.workers import pool, reports

def keep(reporting):
    global connection
    connection = reporting

def work():
    connection.send_bytes(b"1")
    time.sleep(600)

def main():
    heard = []
    with reports(heard.append) as reporting, pool(2, keep, reporting) as executor:
        tasks = [executor.submit(work) for _ in range(3)]
        while len(heard) < 2:
            time.sleep(0.01)
        print("ready", flush=True)
        tasks[0].result()

if __name__ == "__main__":
    sys.exit(console.run(main, str, kept="shards are kept"))
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGINT, 130, "interrupted by SIGINT; shards are kept\n"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM; shards are kept\n"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP; shards are kept\n"),
    ],
)
def test_no_worker_outlives_the_program(tmp_path, number, code, said):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )
    assert process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    if number is signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # A terminal signals the whole process group.
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert number is signal.SIGKILL or errors == said
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive, f"{time.monotonic() - began:.1f} s after the program"
