"""Run the stages of a long job as programs of their own, which a signal to the job asks to save and end.

Each stage has a session of its own, so that Ctrl-C in a terminal reaches this process alone. It asks the programs and
not their launchers: `deepspeed` and `torchrun` would die with a traceback before their ranks have saved.
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

KEPT = "finished stages are kept, the same command goes on"

_lock = threading.RLock()
_running: set[int] = set()
_starting = 0
_asked: int | None = None


def listen() -> None:
    """Take over the signals of this process; the earlier the better. Without a stage at work they end it at once."""
    for number in ENDING:
        if number not in IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def run(command: list[str], **options: Any) -> int:
    """Run a program to its end; returns its exit code. `options` are those of `subprocess.Popen`.

    Raises `Interrupted` if a signal has asked the job to end, once the program has.
    """
    process = _start(command, options)
    try:
        code = process.wait()
    finally:
        _running.discard(process.pid)
    if _asked is not None and code != 0:
        raise Interrupted(_asked)
    return code


def _start(command: list[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    global _starting
    if _asked is not None:
        raise Interrupted(_asked)
    with _lock:
        _starting += 1
        process = subprocess.Popen(command, start_new_session=True, **options)
        _running.add(process.pid)
        _starting -= 1
    if _asked is not None:
        pass_on(process.pid, signal.SIGTERM)
    return process


def _handle(number: int, frame: FrameType | None) -> None:
    """Ask what runs to end: with SIGTERM, which is quiet also while a program imports; a second time with SIGINT."""
    global _asked
    with _lock:
        if not _running and not _starting:
            with suppress(OSError):
                os.write(2, f"{Interrupted(number)}; {KEPT}\n".encode())
            os._exit(128 + number)
        passed = signal.SIGTERM if _asked is None else signal.SIGINT
        _asked = _asked or number
        for pid in list(_running):
            pass_on(pid, passed)


def pass_on(pid: int, number: int) -> None:
    """Send a signal to the programs at and below a process; to a launcher itself only while it has started none."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        below = process.children() if is_launcher(process.cmdline()) else []
        for child in below:
            pass_on(child.pid, number)
        if not below:
            process.send_signal(number)


def ended(interrupt: Interrupted) -> int:
    """Say in one line what a signal has ended; returns the exit code."""
    print(f"{interrupt}; {KEPT}", file=sys.stderr)
    return 128 + interrupt.number
