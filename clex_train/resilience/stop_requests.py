"""Requests to stop: SIGINT, SIGTERM, SIGHUP, SIGUSR1, a dead launcher, a stop file, `max_runtime`.

While a run trains, a signal only sets a flag, and the ranks agree to stop between two steps or two evaluation windows.
Elsewhere a signal raises `Interrupted` in the main thread, which ends the program with one line. A second signal ends
the process at once.
"""

import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from clex_train.resilience.deadline import Deadline, NoDeadline
from clex_train.resilience.launchers import is_alive, is_orphan, launchers

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program which has nothing to save."""
SIGNALS = (*ENDING, signal.SIGUSR1)
IGNORABLE = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored if they were ignored at start, as under `nohup` or for a background job of a script."""
REPEAT_AFTER = 5.0
"""Seconds during which a repeated signal counts as the same request: launchers forward what the group already got."""
MOMENT = 0.5
"""The same for a SIGINT after any first signal, in seconds. A second Ctrl-C is deliberate, so it is short."""
GRACE = 3.0
"""Seconds that an interrupted program may take to unwind before it is ended, for example out of a hung library."""
POLL_SECONDS = 1.0
"""Seconds between two checks for a dead launcher, a stuck main thread or a stop file."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the program, with exit code 128 + its number. Not an `Exception`, so no library swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.kept: str | None = None
        """What there is of the interrupted work, in the words of the code that did it."""


class SignalWatch:
    """A thread that records the first signal or the launcher's death, and ends the process on a second signal.

    `ends`: signals that currently raise `Interrupted` instead of only setting a flag.
    """

    def __init__(self, ends: Collection[signal.Signals] = ()) -> None:
        self.ends = frozenset(ends)
        self.unwinds = False
        """True once a handler for `Interrupted` is in place. Before, during imports, there is nothing to unwind."""
        self.is_leaving = False
        """True while the program exits after its work. Signals of a launcher are then no second request."""
        self.has_work = False
        """True once there is something to save."""
        self._launchers = launchers()
        self._lost_launcher = "its launcher had exited before it started" if is_orphan(self._launchers) else None
        self.reason: str | None = None
        self._first: signal.Signals | None = None
        self._since = 0.0
        self._is_settled = False
        self._raised: signal.Signals | None = None
        self._deferring = 0
        self._deferred: signal.Signals | None = None

    def start(self, taken: Collection[signal.Signals] = SIGNALS) -> None:
        """Install the handlers and start the thread. Call it on the main thread."""
        # Python runs handlers on the main thread only, and not while it is blocked in a collective. The C-level handler
        # writes the signal's number to the wakeup descriptor at once, where our thread reads it.
        reading, writing = socket.socketpair()
        # `set_wakeup_fd` requires it: a full pipe must not block a signal handler.
        writing.setblocking(False)
        for number in taken:
            if number not in IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        # Registered first, it runs last: the interpreter then gives signals their default back, and one that came while
        # modules are taken apart would replace the exit code of a finished program.
        atexit.register(_ignore, taken)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        sys.unraisablehook = self._lost(sys.unraisablehook)
        # Keep a reference, or the garbage collector would close the descriptors.
        self._sockets = (reading, writing)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def leave_marks(self) -> None:
        """Make signals only set a flag from here on, because there is something to save."""
        self.ends, self.has_work = frozenset(), True

    @property
    def interrupted(self) -> signal.Signals | None:
        """Signal that ended the program, even if a library turned `Interrupted` into another error."""
        # Not `_first`: the thread may set that only after the library's error arrives.
        return self._raised

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Postpone `Interrupted` to the end of the block."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        number, self._deferred = self._deferred, None
        if number is not None:
            self._handle(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal on the main thread; signals that only set a flag are left to the thread."""
        if number not in self.ends or self._raised or self.is_leaving:
            return
        if not self.unwinds:
            # Nobody would catch the exception: it would end as a traceback out of some import.
            self._end(signal.Signals(number), f"{Interrupted(number)} before it started")
        if self._deferring:
            self._deferred = signal.Signals(number)
            return
        self._raised = signal.Signals(number)
        raise Interrupted(number)

    def _watch(self, reading: socket.socket) -> None:
        while True:
            ready, _, _ = select.select([reading], [], [], POLL_SECONDS)
            for number in reading.recv(64) if ready else b"":
                if number in SIGNALS:
                    self._mark(signal.Signals(number))
            if self._first and not self._is_settled:
                # While a library holds the GIL, a launcher's copy of the signal waits in the socket. Drain such
                # copies as one request before a later signal may count as the second.
                time.sleep(MOMENT)
                self._since, self._is_settled = time.monotonic(), True
            if self._first and self._is_stuck():
                self._end(self._first, str(Interrupted(self._first)))
            self._check_launchers()

    def _check_launchers(self) -> None:
        """Stop once a launcher has exited; end at once if there is nothing to save."""
        if self._lost_launcher is None and (gone := [each for each in self._launchers if not is_alive(each)]):
            self._lost_launcher = f"its launcher (process {gone[0].pid}) has exited"
        if self._lost_launcher is None or self.is_leaving:
            return
        self.reason = self.reason or self._lost_launcher
        if not self.has_work:
            # Otherwise a rank that is still starting would hold its GPU long after the command has returned.
            self._end(self._first or signal.SIGTERM, f"{self._lost_launcher}: ended")

    def _is_stuck(self) -> bool:
        """Return True if the main thread failed to unwind from an ending signal within `GRACE`."""
        ends = self._raised is not None or self._first in self.ends
        return ends and not self.is_leaving and time.monotonic() - self._since > GRACE

    def _mark(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._since, self.reason = number, now, f"{number.name} arrived"
            if number not in self.ends:
                _print(f"{number.name}: finishing the current work and saving; a second Ctrl-C ends the run at once")
        elif self._is_second(number, now - self._since):
            self._end(number, f"second signal ({number.name}): ended at once")

    def _is_second(self, number: signal.Signals, elapsed: float) -> bool:
        """Return True if a later signal is a new request, and not the first one forwarded by a launcher."""
        if number is signal.SIGINT:
            return elapsed >= MOMENT
        # On Ctrl-C the launchers of DeepSpeed and torchrun send SIGTERM to their ranks, after any delay.
        passed_on = self._first in IGNORABLE and number is signal.SIGTERM and bool(self._launchers)
        return elapsed >= REPEAT_AFTER and not passed_on and not self.is_leaving

    def _end(self, number: signal.Signals, line: str) -> None:
        _print(line)
        # `sys.exit` only raises in this thread; the main thread may be blocked for good.
        os._exit(128 + number)

    def _lost(self, hook: Any) -> Any:
        """Wrap `sys.unraisablehook`: Python prints and drops an exception that is raised in a finalizer."""

        def report(lost: Any) -> None:
            if isinstance(lost.exc_value, Interrupted):
                self._end(signal.Signals(lost.exc_value.number), str(lost.exc_value))
            hook(lost)

        return report


_WATCH: SignalWatch | None = None


def listen() -> None:
    """Handle signals of a training program. Call it before the first slow import; later calls do nothing.

    Until the run trains, SIGINT ends it, and so does the end of its launcher. Other signals set a flag, which it obeys
    before its first step.
    """
    _begin([signal.SIGINT], SIGNALS)


def end_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise `Interrupted`, which `console.program` reports in one line."""
    _begin(ENDING, ENDING)


def _begin(ends: Collection[signal.Signals], taken: Collection[signal.Signals]) -> None:
    global _WATCH
    if _WATCH is None:
        _WATCH = SignalWatch(ends)
        _WATCH.start(taken)


def signals() -> SignalWatch | None:
    """Return the watch that `listen` or `end_on_signals` started, or None."""
    return _WATCH


@contextmanager
def shielding_children() -> Iterator[None]:
    """Start child processes inside the block with SIGINT and SIGHUP blocked, and without being interrupted."""
    # A terminal sends both to the whole process group, but this process decides when its helpers end. Children inherit
    # the mask of blocked signals.
    with _WATCH.deferring() if _WATCH else nullcontext():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORABLE)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore(numbers: Collection[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _print(line: str) -> None:
    """Write a line to standard error, on rank 0 only."""
    # Bypass `sys.stderr`: the main thread may hold the lock of its buffer.
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            # Start a new line after the ^C that a terminal echoes.
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}\n".encode())


class StopRequests:
    """Stop requests that one rank knows of; `agreed` is the same on every rank after their all-reduce."""

    def __init__(
        self, signals: SignalWatch | None = None, stop_file: Path | None = None, deadline: Deadline | None = None
    ) -> None:
        self.signals, self.stop_file = signals, stop_file
        self.deadline: Deadline | NoDeadline = deadline or NoDeadline()
        self.agreed = False
        self.fault: str | None = None
        """Error on this rank that requires a stop. The run then ends as failed instead of interrupted."""
        self._reason: str | None = None
        self._looked = 0.0

    def leave_marks(self) -> None:
        """Make watched signals only set a flag from here on, because there is something to save."""
        if self.signals:
            self.signals.leave_marks()

    def reason(self, *ahead: str) -> str | None:
        """Return why this rank wants to stop before the work `ahead` (kinds that `Deadline` knows), or None.

        A reason never goes away once given.
        """
        self._reason = self._reason or self._find_reason(*ahead)
        return self._reason

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time a `step`, an `evaluation` or a `save` for the deadline, unless it raises."""
        start = time.monotonic()
        # No `finally`: the duration of something that failed says nothing about the next one.
        yield
        self.deadline.took(kind, time.monotonic() - start)

    @property
    def is_too_short(self) -> bool:
        """True if `max_runtime` is too short for a single step or evaluation, so that requeuing would not help."""
        return not self.deadline.has_measured and self.deadline.exceeded_by() is not None

    def _find_reason(self, *ahead: str) -> str | None:
        if self.fault:
            return self.fault
        if self.signals and self.signals.reason:
            return self.signals.reason
        if self.stop_file and self._sees_stop_file(self.stop_file):
            return f"{self.stop_file} exists"
        return self.deadline.exceeded_by(*ahead)

    def _sees_stop_file(self, path: Path) -> bool:
        """Return True if the stop file exists; checks at most once a second and returns False otherwise."""
        # A stat on a network file system can take longer than a step.
        if time.monotonic() - self._looked < POLL_SECONDS:
            return False
        self._looked = time.monotonic()
        return path.exists()
