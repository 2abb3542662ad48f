"""Ctrl-C and a closed terminal of `python train.py`, before and during training."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers import environments

ROOT = Path(__file__).resolve().parents[2]


def start_run(folder: Path, store: Path, architecture: Path, **output) -> subprocess.Popen:
    """Start a run of many short steps in a separate process group, as a shell does."""
    return subprocess.Popen(
        [
            *(sys.executable, "train.py", "+experiment=tiny_base", f"output_dir={folder}", f"data.path={store}"),
            *(f"model.config={architecture}", "model.context_len=32", "data.seq_len=32", "optim.batch_rows=2"),
            *("optim.steps=100000", "evaluation.every=-1", "tracking.wandb=off"),
        ],
        cwd=ROOT,
        env=environments.launch_environment(),
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
        **output,
    )


def await_lines(process: subprocess.Popen, path: Path, wanted: int) -> None:
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < wanted):
        time.sleep(0.05)


enough = threading.Event()


def drain(process: subprocess.Popen, master: int) -> None:
    """Read the output of a program on a terminal until it has the wanted lines."""
    os.set_blocking(master, False)
    while process.poll() is None and not enough.wait(0.1):
        with suppress(BlockingIOError, OSError):
            os.read(master, 1 << 16)


def test_ctrl_c_saves_the_step_and_prints_one_line_on_how_to_resume(tmp_path, tiny_store, tiny_architecture):
    folder = tmp_path / "run"
    process = start_run(folder, tiny_store, tiny_architecture, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    await_lines(process, folder / "metrics.jsonl", 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    step = int((folder / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert last.startswith(f"stopped after step {step}: SIGINT arrived (rank 0); the last checkpoint is ")
    assert last.endswith("; the same command resumes it")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open() if '"loss"' in line][-1] == step
    assert output.count("the same command resumes it") == 2, "there and in the block that opens the run"


def test_a_run_whose_terminal_is_closed_saves(tmp_path, tiny_store, tiny_architecture):
    folder = tmp_path / "run"
    master, terminal = pty.openpty()
    process = start_run(folder, tiny_store, tiny_architecture, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    reader = threading.Thread(target=drain, args=(process, master))
    reader.start()
    await_lines(process, folder / "metrics.jsonl", 3)
    enough.set()
    reader.join()
    os.close(master)
    os.killpg(process.pid, signal.SIGHUP)  # The kernel sends SIGHUP when the controlling terminal closes.
    assert process.wait(300) == 75
    assert (folder / "checkpoints" / "latest").exists()


def test_ctrl_c_before_training_leaves_nothing_behind(tmp_path, tiny_store, tiny_architecture):
    folder = tmp_path / "run"
    process = start_run(folder, tiny_store, tiny_architecture, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for line in process.stderr:
        if "to stop" in line:  # The plan has been printed; loading of weights comes next.
            break
    os.killpg(process.pid, signal.SIGINT)
    errors = process.stderr.read()
    assert process.wait(300) == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted by SIGINT; training had not begun"
    assert not folder.exists()
