"""The lock around DeepSpeed's run-time compilation of extensions."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clex_train.engine import extensions


def _hold_lock(path, ready, seconds, over=None):
    with extensions.exclusive(path, "op"):
        ready.set()
        time.sleep(seconds)
        if over:
            over.set()


def test_a_killed_builder_releases_the_lock(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    builder = context.Process(target=_hold_lock, args=(tmp_path / "op.flock", ready, 600))
    builder.start()
    assert ready.wait(120)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    with caplog.at_level("INFO", logger="clex_train"), extensions.exclusive(tmp_path / "op.flock", "op"):
        assert "waits while" not in caplog.text


def test_a_second_process_waits_for_the_builder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()
    builder = context.Process(target=_hold_lock, args=(tmp_path / "op.flock", ready, 1.0, over))
    builder.start()
    assert ready.wait(120)
    with extensions.exclusive(tmp_path / "op.flock", "op"):
        assert over.is_set()
    builder.join()


BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import load
from clex_train.utils import log
from clex_train.engine import extensions

class Builder:
    name = "small_op"
    def is_compatible(self, verbose):
        return True
    def load(self, verbose):
        return load(self.name, sources=[sys.argv[1]], is_python_module=False, verbose=False)

get_accelerator().create_op_builder = lambda name: Builder()
log.setup()
extensions.build("SmallOpBuilder")
print("built", flush=True)
"""


@pytest.mark.slow
def test_a_launch_builds_after_another_was_killed_while_compiling(tmp_path):
    source, folder = tmp_path / "op.cpp", tmp_path / "extensions"
    # Enough templates to keep the compiler busy for seconds.
    source.write_text(
        "#include <bits/stdc++.h>\nbool f(std::string s) { return std::regex_match(s, std::regex(s)); }\n"
    )
    build = start_build(source, folder)
    deadline = time.monotonic() + 120
    while not any(child.name() == "cc1plus" for child in psutil.Process(build.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        assert build.poll() is None, build.communicate()
        time.sleep(0.01)
    # Otherwise it could finish compiling before the other one has started.
    os.killpg(build.pid, signal.SIGSTOP)
    waiting = start_build(source, folder)
    assert "waits while another one compiles small_op" in waiting.stderr.readline()
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    output, errors = waiting.communicate(timeout=120)
    assert output == "built\n", errors
    assert list(folder.rglob("*.so"))


def start_build(source: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_stale_lock_of_torch_blocks_nobody(tmp_path):
    source, folder = tmp_path / "op.cpp", tmp_path / "extensions"
    source.write_text("int f() { return 1; }\n")
    first = start_build(source, folder)
    output, errors = first.communicate(timeout=120)
    assert output == "built\n", errors
    (library,) = folder.rglob("*.so")
    library.unlink()
    (library.parent / "lock").touch()
    again = start_build(source, folder)
    output, errors = again.communicate(timeout=120)
    assert output == "built\n", errors
