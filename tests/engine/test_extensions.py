"""The guard around DeepSpeed's run-time compilation."""

import multiprocessing
import os
import signal
import time

from clex_train.engine import extensions


def _hold(path, ready, seconds):
    with extensions.exclusive(path, "op"):
        ready.set()
        time.sleep(seconds)


def test_a_killed_builder_leaves_nothing_that_others_wait_for(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    builder = context.Process(target=_hold, args=(tmp_path / "op.flock", ready, 600))
    builder.start()
    assert ready.wait(30)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    start = time.monotonic()
    with extensions.exclusive(tmp_path / "op.flock", "op"):
        assert time.monotonic() - start < 5


def test_a_second_process_waits_for_the_builder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    builder = context.Process(target=_hold, args=(tmp_path / "op.flock", ready, 1.0))
    builder.start()
    assert ready.wait(30)
    start = time.monotonic()
    with extensions.exclusive(tmp_path / "op.flock", "op"):
        assert time.monotonic() - start > 0.5
    builder.join()
