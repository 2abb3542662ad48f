"""Worker processes that end with the program, whether it fails, is interrupted, or is killed with SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from clex_train.resilience.stop_requests import shielding_children


class _Pool(ProcessPoolExecutor):
    """Pool whose processes do not receive the terminal's signals; they start lazily, as tasks are submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        with shielding_children():
            return super().submit(function, *arguments, **named)


@contextmanager
def pool(workers: int, start: Callable[..., object], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Start processes that first call `start(*arguments)`.

    At the end of the block, running tasks finish and pending ones are dropped; an interrupt kills the processes.
    """
    # spawn: a fork would copy torch's and the tokenizers' threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    with shielding_children():
        executor = _Pool(workers, context, _start, (start, *arguments))
    try:
        yield executor
    except Exception:
        raise
    except BaseException:
        # KeyboardInterrupt, or GeneratorExit of a generator that is closed: nobody needs the results any more.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def reports(receive: Callable[[bytes], object]) -> Iterator[Connection]:
    """Yield a connection for the workers of a `pool` inside; a thread calls `receive` with each message.

    Messages must be at most 512 bytes.
    """
    # POSIX writes up to 512 bytes to a pipe atomically. So workers need no lock, which a killed one would never free.
    reading, writing = multiprocessing.Pipe(duplex=False)

    def read() -> None:
        with suppress(EOFError):
            while True:
                receive(reading.recv_bytes())

    thread = threading.Thread(target=read, name="reports", daemon=True)
    thread.start()
    try:
        yield writing
    finally:
        # The workers have ended by now; closing the last writer ends the thread.
        writing.close()
        thread.join()
        reading.close()


def end_with_parent() -> None:
    """End this process when its parent is gone; a parent killed with SIGKILL cannot notify its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process started by multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _start(start: Callable[..., object], *arguments: Any) -> None:
    end_with_parent()
    start(*arguments)
