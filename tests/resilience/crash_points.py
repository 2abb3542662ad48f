"""Run a program and send it SIGKILL at a crash point: one of the calls that change files below a folder.

    CRASH_ROOT=FOLDER CRASH_LOG=FILE CRASH_AT=7 python tests/resilience/crash_points.py train.py ARGUMENT ...

The log gets a line for each point, before its call. AT counts them from 1; 0 kills nowhere. A file has two more points,
at which a kill leaves it empty or half written: after it was opened, and before it is flushed. Calls of all threads
of a process are counted together. Writes by Rust libraries are not seen, only the calls around them.
"""

import fcntl
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
CHANGING = os.O_CREAT | os.O_TRUNC
NAMES = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
"""Calls that create or remove a name, with the index of the argument for its folder."""


class Watch:
    """Count the crash points of this process below `root`, and kill it at number `at`."""

    def __init__(self, root: Path, log: Path, at: int) -> None:
        self.root, self.at = root, at
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._count = 0
        self._flushed: dict[Path, int] = {}
        """Sizes of files when they were opened or last flushed."""
        self._lock = threading.RLock()
        self._fsync = os.fsync

    def begin(self) -> None:
        """Watch until the process ends; an audit hook cannot be removed."""
        sys.addaudithook(self._audit)
        os.fsync = self._flush

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            self._open(given[0], given[2])
        elif event in NAMES:
            path = _path(given[0], given[NAMES[event]])
            # A failing call changes nothing.
            if os.path.lexists(path) != (event == "os.mkdir"):
                self._point(event, path)
        elif event == "os.rename" and os.path.lexists(source := _path(given[0], given[2])):
            self._point(event, source, _path(given[1], given[3]))
        elif event in ("os.link", "os.symlink"):
            self._point(event, _path(given[1], given[-1]))
        elif event == "os.truncate":
            self._point(event, _path(given[0], -1))

    def _open(self, path: Any, flags: int) -> None:
        if isinstance(path, int) or not flags & (WRITING | CHANGING):
            return
        path = _path(path, -1)
        if path.is_dir():  # O_TMPFILE: a file without a name
            return
        size = path.stat().st_size if path.exists() and not flags & os.O_TRUNC else 0
        self._flushed[path] = size
        if flags & os.O_TRUNC or not path.exists():
            self._point("open", path)
            self._point("opened", path, leave=lambda: os.close(os.open(path, flags, 0o666)))

    def _flush(self, descriptor: int) -> None:
        path, flags = _path(descriptor, -1), fcntl.fcntl(descriptor, fcntl.F_GETFL)
        before, now = self._flushed.get(path, 0), os.fstat(descriptor).st_size
        # Appended files are written line by line, so no kill leaves half of many lines.
        if flags & WRITING and not flags & os.O_APPEND and now > before:
            self._point("half", path, leave=lambda: os.truncate(path, (before + now) // 2))
        self._point("fsync", path)
        self._fsync(descriptor)
        self._flushed[path] = now

    def _point(self, what: str, *paths: Path, leave: Callable[[], object] = lambda: None) -> None:
        if self.at < 0 or not any(path.is_relative_to(self.root) for path in paths):
            return
        with self._lock:
            self._count += 1
            names = " ".join(str(path.relative_to(self.root)) for path in paths)
            os.write(self._log, f"{os.getpid()} {what} {names}\n".encode())
            if self._count == self.at:
                self.at = -1
                leave()
                os.kill(os.getpid(), signal.SIGKILL)


def _path(given: Any, folder: int) -> Path:
    """Return the path of a call, given as a descriptor or relative to the descriptor `folder` (-1: none)."""
    if isinstance(given, int):
        return Path(os.readlink(f"/proc/self/fd/{given}"))
    name = os.fsdecode(given)
    return Path(os.readlink(f"/proc/self/fd/{folder}"), name) if folder >= 0 else Path(name).absolute()


def watch() -> None:
    """Watch this process as configured by its environment."""
    at, root, log = (os.environ[f"CRASH_{name}"] for name in ("AT", "ROOT", "LOG"))
    Watch(Path(root), Path(log), int(at)).begin()


if __name__ == "__main__":
    watch()
    del sys.argv[0]
    sys.path[0] = os.getcwd()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
