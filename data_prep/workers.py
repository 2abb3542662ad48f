"""Worker processes that end with the program, whether it fails, is interrupted, or is killed by SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from multiprocessing.managers import SyncManager
from typing import Any

from clex_train.stopping import shielding_children


class _Pool(ProcessPoolExecutor):
    """Starts its processes, which it does as work comes in, where no signal of a terminal reaches them."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        with shielding_children():
            return super().submit(function, *arguments, **named)


@contextmanager
def pool(workers: int, start: Callable[..., object], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that each call `start(*arguments)` first.

    At the end of the block, work that runs is waited for and the rest dropped; an interrupt kills the processes.
    """
    with shielding_children():
        executor = _Pool(workers, _context(), _start, (start, *arguments))
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
def manager() -> Iterator[SyncManager]:
    """A manager of objects that the workers of a `pool` inside share."""
    with shielding_children():
        context = _context()
    with shielding_children():
        shared = SyncManager(ctx=context)
        shared.start(end_with_parent)
    with shared:
        yield shared


def _context() -> SpawnContext:
    context = multiprocessing.get_context("spawn")
    # The first semaphore of a process starts multiprocessing's resource tracker, which then unblocks SIGINT.
    context.Lock()
    return context


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
