"""Worker processes that end with the program, whether it fails, is interrupted, or is killed by SIGKILL."""

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
    """Starts its processes, which it does as work comes in, where no signal of a terminal reaches them."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        with shielding_children():
            return super().submit(function, *arguments, **named)


@contextmanager
def pool(workers: int, start: Callable[..., object], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Start processes that each call `start(*arguments)` first.

    At the end of the block, work that runs is waited for and the rest dropped; an interrupt kills the processes.
    """
    context = multiprocessing.get_context("spawn")
    with shielding_children():
        executor = _Pool(workers, context, _start, (start, *arguments))
    try:
        yield executor
    except Exception:
        raise
    except BaseException:
        # Also a generator that is closed: nobody waits for these results any more.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def reports(receive: Callable[[bytes], object]) -> Iterator[Connection]:
    """Yield where workers of a `pool` inside `send_bytes` to; a thread here hands each message on.

    Messages are short: the kernel writes up to 512 bytes in one piece, so that the workers need no lock, which a killed
    one would never let go of.
    """
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
        # The workers are gone by now, and with the last writer the thread ends.
        writing.close()
        thread.join()
        reading.close()


def end_with_parent() -> None:
    """End this process when the one that started it is gone: killed by SIGKILL, it cannot say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a process that multiprocessing has started has such a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _start(start: Callable[..., object], *arguments: Any) -> None:
    end_with_parent()
    start(*arguments)
