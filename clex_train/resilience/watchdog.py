"""Heartbeat watchdog: find the rank that died, stopped or hangs, and end the others instead of letting them wait.

Each rank writes a heartbeat to the process group's store: a counter, the place of its main thread, and the time spent
there. Rank 0 reads all heartbeats, the others read rank 0's. A heartbeat that does not change for two thirds of
`engine.timeout` (dead or stopped process, lost node) ends the run. A hung main thread still beats, and is named once
the collective that waits for it times out.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from clex_train.utils import distributed, log
from clex_train.utils.errors import RankLost, first_line

logger = log.get(__name__)

EXIT_CODE = RankLost.exit_code
PATIENCE = 2 / 3
"""Share of `engine.timeout` after which a silent rank is given up: before the collective's own, vaguer timeout."""
COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")
"""Parts of file names whose frames mean that a thread is inside a collective."""
CONNECTION = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe")
"""Words that mark the error of a collective, which torch raises as a plain `RuntimeError`."""


@contextmanager
def watching(timeout: float) -> Iterator["Watchdog"]:
    """Watch the other ranks inside the block; `timeout` in seconds. Collective.

    The error of a collective becomes `RankLost`. A silent rank ends this process with the exit code of `RankLost`.
    """
    watchdog = Watchdog(timeout)
    watchdog.start()
    with watchdog.explaining():
        yield watchdog


@dataclass
class Beat:
    """Heartbeat of a rank."""

    count: int
    process: str
    where: str
    seconds: float
    """Time that the main thread has spent at `where`."""
    waits: bool
    """True inside a collective."""
    done: bool = False
    """True once the rank has finished, and will send no more."""


@dataclass
class Heard:
    """The last heartbeat of a rank, and when it arrived by the listener's own clock: nodes' clocks may differ."""

    beat: Beat
    at: float
    """From `time.monotonic`, in seconds."""


class Watchdog:
    """Watches the other ranks from `start`, once the process group is open, to `close`. Idle for a single rank."""

    def __init__(self, timeout: float) -> None:
        """Prepare a watchdog; `timeout` is that of a collective, in seconds."""
        self.limit = PATIENCE * timeout
        # Rank 0 reads every heartbeat, so beat less often with many ranks.
        self.interval = min(max(0.2, timeout / 20), max(1.0, min(5.0, distributed.world_size() / 100)))
        self.heard: dict[int, Heard] = {}
        self._count, self._place, self._since = 0, None, time.monotonic()
        self._answered = time.monotonic()
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        self._store: Any = None

    def start(self) -> None:
        """Start the threads after every rank has written its first heartbeat. Collective."""
        if distributed.world_size() == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's is blocked while the main thread waits in it.
        self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(1.0, self.limit)))
        self._leave_beat()
        distributed.barrier()
        # Two threads, because `_exchange` itself blocks when rank 0's store is gone.
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Mark this rank finished, so that its silence is not reported."""
        if self._store is not None and not self._closed.is_set():
            self._closed.set()
            try:
                self._leave_beat(done=True)
            except (RuntimeError, OSError):
                logger.debug("the store closed before this rank did")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the error of a collective into `RankLost`, which names the rank at fault."""
        try:
            yield
        except RuntimeError as error:
            # A checkpoint interrupted by a lost rank raises its own error, with the collective's as the cause.
            cause = error.__cause__ or error
            if self._store is None or not any(word in str(cause).lower() for word in CONNECTION):
                raise
            raise RankLost(f"{self.diagnosis()}; the checkpoints are intact ({first_line(cause)})") from error
        finally:
            self.close()

    def diagnosis(self) -> str:
        """Name the ranks at fault for a failed collective, from the heartbeats of four intervals. Takes that long."""
        before = self._read_all()
        time.sleep(4 * self.interval)
        after = self._read_all()
        if not before or not after:
            return "rank 0, or the process of its store, is gone"
        silent = [rank for rank in after if not after[rank].done and after[rank].count == before[rank].count]
        if silent:
            return "; ".join(f"rank {rank} is gone or stopped ({_describe(after[rank])})" for rank in silent)
        # Everybody beats, so somebody's main thread is somewhere else than in the collective, and has been for long.
        busy = [rank for rank in after if not after[rank].done and not after[rank].waits and rank != distributed.rank()]
        blamed = [rank for rank in busy if after[rank].seconds >= 4 * self.interval] or list(after)
        return "; ".join(f"rank {rank}: {_describe(after[rank])}" for rank in blamed)

    def _exchange(self) -> None:
        while not self._closed.wait(self.interval):
            try:
                self._leave_beat()
                self._hear(range(distributed.world_size()) if distributed.is_main() else [0])
            except (RuntimeError, OSError):
                # The store is gone. `_judge` ends this rank if that lasts.
                return
            self._answered = time.monotonic()

    def _judge(self) -> None:
        while not self._closed.wait(self.interval):
            now = time.monotonic()
            if now - self._answered > self.limit and not distributed.is_main():
                self._give_up(
                    f"rank 0 has not answered for {now - self._answered:.0f} s: it is gone, stopped or unreachable"
                )
            for rank, heard in list(self.heard.items()):
                if rank != distributed.rank() and not heard.beat.done and now - heard.at > self.limit:
                    self._give_up(f"rank {rank} sent no heartbeat for {now - heard.at:.0f} s ({_describe(heard.beat)})")

    def _give_up(self, what: str) -> None:
        """End this process even if its main thread is blocked; the launcher then ends the others."""
        if self._closed.is_set():
            return
        line = f"error: {what}; the checkpoints are intact\n"
        with suppress(OSError):  # a terminal that was closed
            os.write(sys.stderr.fileno(), line.encode())
        # No exception can reach a main thread that is blocked inside NCCL or gloo.
        os._exit(EXIT_CODE)

    def _hear(self, ranks: Any) -> None:
        ranks = list(ranks)
        for rank, beat in zip(ranks, self._read(ranks), strict=True):
            last = self.heard.get(rank)
            if last is None or last.beat.count != beat.count or beat.done:
                self.heard[rank] = Heard(beat, time.monotonic())

    def _read_all(self) -> dict[int, Beat]:
        try:
            return dict(enumerate(self._read(list(range(distributed.world_size())))))
        except (RuntimeError, OSError):
            return {}

    def _read(self, ranks: list[int]) -> list[Beat]:
        return [Beat(**json.loads(value)) for value in self._store.multi_get([_key(rank) for rank in ranks])]

    def _leave_beat(self, done: bool = False) -> None:
        place, where, waits = locate(sys._current_frames().get(self._main or 0))
        # An exact place that stays the same means a hang; a busy thread moves on between two heartbeats.
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        self._count += 1
        process = f"process {os.getpid()} on {socket.gethostname()}"
        beat = Beat(self._count, process, where, round(time.monotonic() - self._since, 1), waits, done)
        self._store.set(_key(distributed.rank()), json.dumps(asdict(beat)))


def locate(frame: FrameType | None) -> tuple[Any, str, bool]:
    """Describe a thread's position: (exact place, readable name, whether it is inside a collective).

    The name is that of the innermost function of this package, or of the innermost function of all.
    """
    # Frame identity and bytecode offset: another call of the same function counts as movement.
    place = (id(frame), frame.f_lasti) if frame else None
    innermost, ours, waits = frame, "", False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in COLLECTIVE)
        if not ours and "clex_train/" in file and not file.endswith("clex_train/utils/distributed.py"):
            ours = _name(frame)
        frame = frame.f_back
    return place, ours or (_name(innermost) if innermost else "its end"), waits


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"


def _describe(beat: Beat) -> str:
    doing = "waiting for others" if beat.waits else "working"
    return f"{beat.process}, {doing} in {beat.where} for {beat.seconds:.0f} s when last heard of"


def _key(rank: int) -> str:
    return f"clex_train/beat/{rank}"
