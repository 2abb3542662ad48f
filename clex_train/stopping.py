"""What asks a run to stop with a checkpoint: SIGTERM, SIGUSR1, a launcher that died, a stop file, `max_runtime`.

A signal only leaves a mark, whatever it interrupts; the ranks agree between two steps, or between two windows of an
evaluation. Signals are taken by a thread, because Python's own handlers wait for the main thread to come back from a
collective: a second one, `REPEAT_AFTER` seconds or more behind the first, ends the process at once.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_AFTER = 5.0
"""Seconds in which a repeated signal is taken for the same request: launchers pass on what the whole group got."""
POLL_SECONDS = 1.0
LAUNCHERS = ("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
"""Programs or modules, as they stand on a command line."""
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Environment variables of a process that `deepspeed` or `torchrun` started."""


class SignalWatch:
    """A thread that marks the first signal or the death of the launcher, and obeys a second signal at once."""

    def __init__(self) -> None:
        self._launchers = launchers()
        self.reason: str | None = "its launcher was gone before it began" if is_orphan(self._launchers) else None
        self._since = 0.0

    def start(self) -> None:
        """Take over the signals of this process; on its main thread."""
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _leave_to_the_thread)
        self._sockets = (reading, writing)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def _watch(self, reading: socket.socket) -> None:
        while True:
            ready, _, _ = select.select([reading], [], [], POLL_SECONDS)
            for number in reading.recv(64) if ready else b"":
                if number in SIGNALS:
                    self._mark(signal.Signals(number))
            if self.reason is None and (gone := [process for process in self._launchers if not _lives(process)]):
                self.reason = f"its launcher (process {gone[0].pid}) is gone"

    def _mark(self, number: signal.Signals) -> None:
        if self._since == 0.0:
            self._since, self.reason = time.monotonic(), f"{number.name} arrived"
        elif time.monotonic() - self._since >= REPEAT_AFTER:
            os.write(sys.stderr.fileno(), f"a second signal ({number.name}): ended at once\n".encode())
            os._exit(128 + number)


_WATCH: SignalWatch | None = None


def listen() -> None:
    """Take over the signals of this process, as early as its entry point can; a second call changes nothing."""
    global _WATCH
    if _WATCH is None:
        _WATCH = SignalWatch()
        _WATCH.start()


def signals() -> SignalWatch | None:
    """The watch that `listen` started, if it did."""
    return _WATCH


class StopRequests:
    """What one rank knows of requests to stop; `agreed` is the same on every rank once they have exchanged flags."""

    def __init__(
        self, signals: SignalWatch | None = None, stop_file: Path | None = None, deadline: "Deadline | None" = None
    ) -> None:
        self.signals, self.stop_file, self.deadline = signals, stop_file, deadline
        self.agreed = False
        self._reason: str | None = None
        self._looked = 0.0

    def reason(self, *ahead: str) -> str | None:
        """Why this rank wants to stop before doing what `ahead` names (kinds of work that `Deadline` knows).

        Once there is a reason it stays.
        """
        self._reason = self._reason or self._find_reason(*ahead)
        return self._reason

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Measure a `step`, an `evaluation` or a `save` for the deadline, unless it fails."""
        start = time.monotonic()
        yield
        if self.deadline:
            self.deadline.took(kind, time.monotonic() - start)

    @property
    def leads_nowhere(self) -> bool:
        """Whether `max_runtime` is too short for a single step or evaluation, so that starting again would not help."""
        return self.deadline is not None and not self.deadline.has_measured and self.deadline.exceeded_by() is not None

    def _find_reason(self, *ahead: str) -> str | None:
        if self.signals and self.signals.reason:
            return self.signals.reason
        if self.stop_file and self._sees_stop_file(self.stop_file):
            return f"{self.stop_file} is there"
        return self.deadline.exceeded_by(*ahead) if self.deadline else None

    def _sees_stop_file(self, path: Path) -> bool:
        """Asked at most once a second: a network file system answers slowly."""
        if time.monotonic() - self._looked < POLL_SECONDS:
            return False
        self._looked = time.monotonic()
        return path.exists()


class Deadline:
    """The end of `max_runtime`, and whether work and the save after it still fit before it.

    Work is expected to take as long as the longest of its kind among the last `MEMORY`, and half as long again.
    """

    MEMORY = 20
    SLACK = 1.5

    def __init__(self, limit: float, started: float | None = None) -> None:
        """`limit` in seconds since `started`, a time of the epoch; by default the moment this process began."""
        self.limit = limit
        self.started = psutil.Process().create_time() if started is None else started
        self.margin = min(60.0, 0.02 * limit)
        self._assumed: dict[str, float] = {}
        self._measured: dict[str, list[float]] = {}

    def assume(self, kind: str, seconds: float) -> None:
        """Expect this until work of the kind has been measured; without it, nothing."""
        self._assumed[kind] = seconds

    def took(self, kind: str, seconds: float) -> None:
        """Remember how long a `step`, an `evaluation` or a `save` took."""
        self._measured[kind] = [*self._measured.get(kind, []), seconds][-self.MEMORY :]

    def left(self) -> float:
        """Seconds until the limit."""
        return self.started + self.limit - time.time()

    def exceeded_by(self, *ahead: str) -> str | None:
        """The reason to stop now instead of doing what `ahead` names; None while it fits."""
        needed = self.margin + sum(self._expected(kind) for kind in (*ahead, "save"))
        if self.left() > needed:
            return None
        return f"max_runtime ends in {max(0.0, self.left()):.0f} s"

    @property
    def has_measured(self) -> bool:
        """Whether anything of the run has been timed yet."""
        return bool(self._measured)

    def _expected(self, kind: str) -> float:
        known = self._measured.get(kind)
        return self.SLACK * (max(known) if known else self._assumed.get(kind, 0.0))


def launchers() -> list[psutil.Process]:
    """The launcher's processes above this one, nearest first; empty without one."""
    found = []
    for process in psutil.Process().parents():
        try:
            if not _is_launcher(process.cmdline()):
                break
        except psutil.Error:
            break
        found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_orphan(found: list[psutil.Process]) -> bool:
    """Whether a launcher that began this process, or that launcher's own, has died and left the child to process 1."""
    if not found:
        return os.getppid() == 1 and any(name in os.environ for name in SET_BY_LAUNCHERS)
    # `deepspeed` starts this module, which starts the ranks.
    return found[-1].ppid() == 1 and "deepspeed.launcher.launch" in found[-1].cmdline()


def _is_launcher(arguments: list[str]) -> bool:
    return any(Path(argument).name in LAUNCHERS for argument in arguments[:4])


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Keep the signal from ending the process; the thread hears of it through the wake-up socket."""
