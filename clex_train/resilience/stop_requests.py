"""Requests to stop: SIGINT, SIGTERM, SIGHUP, SIGUSR1, a launcher that died, a stop file, `max_runtime`.

While a run trains, a signal only leaves a mark, whatever it interrupts; the ranks agree between two steps, or between
two windows of an evaluation. Anywhere else a signal ends the program: `Interrupted` in the main thread, with one line.
Signals are taken by a thread, because Python's own handlers wait for the main thread to come back from a collective:
a second one ends the process at once.
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

import psutil

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program which has nothing to save."""
SIGNALS = (*ENDING, signal.SIGUSR1)
IGNORABLE = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored if they were when the program began, as under `nohup` or in a script's background."""
REPEAT_AFTER = 5.0
"""Seconds in which a repeated signal is taken for the same request: launchers pass on what the whole group got."""
MOMENT = 0.5
"""The same for SIGINT after a first signal: whoever presses Ctrl-C twice means it."""
GRACE = 3.0
"""Seconds that an interrupted program may take to unwind, for instance out of a library that does not come back."""
POLL_SECONDS = 1.0
LAUNCHERS = ("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
"""Programs or modules, as they stand on a command line."""
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Environment variables of a process that `deepspeed` or `torchrun` started."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the program with exit code 128 + its number; no `except Exception` takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class SignalWatch:
    """A thread that marks the first signal or the death of the launcher, and obeys a second signal at once.

    `ends`: signals that for now raise `Interrupted` instead of only leaving a mark.
    """

    def __init__(self, ends: Collection[signal.Signals] = ()) -> None:
        self.ends = frozenset(ends)
        self.unwinds = False
        """Somebody waits for `Interrupted`; before, while the program imports, there is nothing to unwind."""
        self.is_leaving = False
        """The program is past its work and exits: what a launcher still sends is no second request."""
        self._launchers = launchers()
        self.reason: str | None = "its launcher was gone before it began" if is_orphan(self._launchers) else None
        self._first: signal.Signals | None = None
        self._since = 0.0
        self._is_settled = False
        self._raised: signal.Signals | None = None
        self._deferring = 0
        self._deferred: signal.Signals | None = None

    def start(self, taken: Collection[signal.Signals] = SIGNALS) -> None:
        """Take over the signals of this process; on its main thread."""
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        for number in taken:
            if number not in IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        # Registered first, it runs last: the interpreter then gives signals their default back, and one that came while
        # modules are taken apart would replace the exit code of a finished program.
        atexit.register(_ignore, taken)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        sys.unraisablehook = self._lost(sys.unraisablehook)
        self._sockets = (reading, writing)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def leave_marks(self) -> None:
        """Let signals only leave a mark from here on: there is something to save."""
        self.ends = frozenset()

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that ended the program, also where a library made another error of `Interrupted`."""
        # Not `_first`: the thread that sets it may come later than the error that the library made.
        return self._raised

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Raise `Interrupted` only when the block has ended."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        number, self._deferred = self._deferred, None
        if number is not None:
            self._handle(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal on Python's main thread: what only leaves a mark is left to the thread."""
        if number not in self.ends or self._raised or self.is_leaving:
            return
        if not self.unwinds:
            self._end(signal.Signals(number), f"{Interrupted(number)} before it began")
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
                # A library that keeps the GIL may let this thread see a launcher's copy late, but not after this.
                time.sleep(MOMENT)
                self._since, self._is_settled = time.monotonic(), True
            if self._first and self._is_stuck():
                self._end(self._first, str(Interrupted(self._first)))
            if self.reason is None and (gone := [process for process in self._launchers if not _lives(process)]):
                self.reason = f"its launcher (process {gone[0].pid}) is gone"

    def _is_stuck(self) -> bool:
        """Tell whether the main thread has had the time to unwind from a signal that ends the program, and has not."""
        ends = self._raised is not None or self._first in self.ends
        return ends and not self.is_leaving and time.monotonic() - self._since > GRACE

    def _mark(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._since, self.reason = number, now, f"{number.name} arrived"
            if number not in self.ends:
                _say(f"{number.name}: finishes and saves what it is doing; a second Ctrl-C ends it at once")
        elif self._is_second(number, now - self._since):
            self._end(number, f"a second signal ({number.name}): ended at once")

    def _is_second(self, number: signal.Signals, elapsed: float) -> bool:
        """Tell whether a later signal is another request and not the first one that a launcher passes on."""
        if number is signal.SIGINT:
            return elapsed >= MOMENT
        passed_on = self._first in IGNORABLE and number is signal.SIGTERM and bool(self._launchers)
        return elapsed >= REPEAT_AFTER and not passed_on and not self.is_leaving

    def _end(self, number: signal.Signals, line: str) -> None:
        _say(line)
        os._exit(128 + number)

    def _lost(self, hook: Any) -> Any:
        """Stand in for `sys.unraisablehook`: `Interrupted` in a finalizer would be printed and forgotten."""

        def report(lost: Any) -> None:
            if isinstance(lost.exc_value, Interrupted):
                self._end(signal.Signals(lost.exc_value.number), str(lost.exc_value))
            hook(lost)

        return report


_WATCH: SignalWatch | None = None


def listen() -> None:
    """Take over the signals of a training program, before its first costly import; a second call changes nothing.

    Until the run trains SIGINT ends it; the others leave a mark that it obeys before its first step.
    """
    _begin([signal.SIGINT], SIGNALS)


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end a program with `Interrupted`, which `cli.console` says in one line."""
    _begin(ENDING, ENDING)


def _begin(ends: Collection[signal.Signals], taken: Collection[signal.Signals]) -> None:
    global _WATCH
    if _WATCH is None:
        _WATCH = SignalWatch(ends)
        _WATCH.start(taken)


def signals() -> SignalWatch | None:
    """Return the watch that `listen` or `end_on_signals` started, if one did."""
    return _WATCH


@contextmanager
def shielding_children() -> Iterator[None]:
    """Start child processes, within, with SIGINT and SIGHUP blocked, and let no signal interrupt their start.

    A terminal sends both to the whole group, but it is this process that has to end its helpers.
    """
    with _WATCH.deferring() if _WATCH else nullcontext():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORABLE)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore(numbers: Collection[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    """Write a line to standard error without Python's buffers, whose lock the main thread may hold; rank 0 speaks."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            # After the ^C that a terminal echoes.
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}\n".encode())


class StopRequests:
    """What one rank knows of requests to stop; `agreed` is the same on every rank once they have exchanged flags."""

    def __init__(
        self, signals: SignalWatch | None = None, stop_file: Path | None = None, deadline: "Deadline | None" = None
    ) -> None:
        self.signals, self.stop_file = signals, stop_file
        self.deadline: Deadline | NoDeadline = deadline or NoDeadline()
        self.agreed = False
        self.fault: str | None = None
        """What makes this rank ask for the stop although nobody else did: the run ends as one that cannot go on."""
        self._reason: str | None = None
        self._looked = 0.0

    def leave_marks(self) -> None:
        """Let signals only leave a mark from here on, if they are watched: there is something to save."""
        if self.signals:
            self.signals.leave_marks()

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
        self.deadline.took(kind, time.monotonic() - start)

    @property
    def leads_nowhere(self) -> bool:
        """Whether `max_runtime` is too short for a single step or evaluation, so that starting again would not help."""
        return not self.deadline.has_measured and self.deadline.exceeded_by() is not None

    def _find_reason(self, *ahead: str) -> str | None:
        if self.fault:
            return self.fault
        if self.signals and self.signals.reason:
            return self.signals.reason
        if self.stop_file and self._sees_stop_file(self.stop_file):
            return f"{self.stop_file} is there"
        return self.deadline.exceeded_by(*ahead)

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


class NoDeadline:
    """Stands in for `Deadline` in a run without `max_runtime`: everything fits."""

    has_measured = True

    def assume(self, kind: str, seconds: float) -> None:
        """Ignore an expectation."""

    def took(self, kind: str, seconds: float) -> None:
        """Ignore a measurement."""

    def exceeded_by(self, *ahead: str) -> str | None:
        """Return no reason to stop."""
        return None


def launchers() -> list[psutil.Process]:
    """List the launcher's processes above this one, nearest first; empty without one."""
    found = []
    for process in psutil.Process().parents():
        try:
            if not is_launcher(process.cmdline()):
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


def is_launcher(arguments: list[str]) -> bool:
    """Tell whether a command line is that of `deepspeed` or `torchrun`."""
    return any(Path(argument).name in LAUNCHERS for argument in arguments[:4])
