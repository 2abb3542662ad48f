"""Run the stages of a long job as subprocesses; a signal to the job makes them save and stop.

Each stage has its own session, so that Ctrl-C in a terminal reaches only this process. The signal goes to the programs,
not to their launchers: `deepspeed` and `torchrun` would die with a traceback before their ranks have saved.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from clex_train.resilience.launchers import is_launcher
from clex_train.resilience.stop_requests import ENDING, IGNORABLE, Interrupted

KEPT = "finished stages are kept, run the same command to continue"

_lock = threading.RLock()
_running: set[int] = set()
_starting = 0
_asked: int | None = None


def listen() -> None:
    """Install the signal handlers, as early as possible; without a running stage, a signal ends the process at once."""
    # nohup ignores SIGHUP; keep it ignored.
    for number in ENDING:
        if number not in IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def run(command: list[str], **options: Any) -> int:
    """Run a program to its end and return its exit code; `options` go to `subprocess.Popen`.

    Raises `Interrupted` after the program has ended, if the job received a signal.
    """
    process = _start(command, options)
    try:
        code = process.wait()
    finally:
        _running.discard(process.pid)
    # A program that finished its work (code 0) despite the signal counts as done.
    if _asked is not None and code != 0:
        raise Interrupted(_asked)
    return code


def _start(command: list[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    global _starting
    if _asked is not None:
        raise Interrupted(_asked)
    # The handler runs in this thread between any two bytecodes: `_starting` covers the time before the pid is known.
    with _lock:
        _starting += 1
        process = subprocess.Popen(command, start_new_session=True, **options)
        _running.add(process.pid)
        _starting -= 1
    # The signal came while Popen was at work, and the handler could not see the process yet.
    if _asked is not None:
        pass_on(process.pid, signal.SIGTERM)
    return process


def _handle(number: int, frame: FrameType | None) -> None:
    """Stop running stages: first by SIGTERM, which is quiet even during imports, then by SIGINT."""
    global _asked
    with _lock:
        if not _running and not _starting:
            # print is not reentrant, and the signal may have arrived within one.
            with suppress(OSError):
                os.write(2, f"{Interrupted(number)}; {KEPT}\n".encode())
            os._exit(128 + number)
        passed = signal.SIGTERM if _asked is None else signal.SIGINT
        _asked = _asked or number
        for pid in list(_running):
            pass_on(pid, passed)


def pass_on(pid: int, number: int) -> None:
    """Send a signal to the programs of a process tree; to a launcher itself only before it has started any."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        below = process.children() if is_launcher(process.cmdline()) else []
        for child in below:
            pass_on(child.pid, number)
        if not below:
            process.send_signal(number)


def ended(interrupt: Interrupted) -> int:
    """Report in one line that a signal ended the job, and return the exit code."""
    print(f"{interrupt}; {KEPT}", file=sys.stderr)
    return 128 + interrupt.number
