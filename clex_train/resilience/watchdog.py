"""Finds the rank that died, froze or hangs, and ends the others instead of letting them wait for it.

Each rank writes a beat into the store that the process group met in: a counter, where its main thread is, and for how
long it has been there. Rank 0 reads all beats, the others rank 0's. A beat that does not change for two thirds of
`engine.timeout` (a dead or stopped process, a lost node) ends the run; a main thread that is stuck is named when the
collective that the others wait in gives up after `engine.timeout`.
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
"""Share of `engine.timeout` after which a rank without a sign of life is given up."""
COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")
CONNECTION = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe")
"""Words by which the errors of a collective are known; torch raises them as plain `RuntimeError`."""


@contextmanager
def watching(timeout: float) -> Iterator["Watchdog"]:
    """Watch the other ranks inside the block; `timeout` in seconds. Collective.

    The error of a collective becomes `RankLost`; a rank that gives no sign ends this process with its exit code.
    """
    watchdog = Watchdog(timeout)
    watchdog.start()
    with watchdog.explaining():
        yield watchdog


@dataclass
class Beat:
    """What a rank says of itself."""

    count: int
    process: str
    where: str
    seconds: float
    """For which the main thread has been there."""
    waits: bool
    """Whether it is in a collective."""
    done: bool = False


@dataclass
class Heard:
    """The last beat of a rank and when it changed, by the clock of the rank that listens."""

    beat: Beat
    at: float


class Watchdog:
    """Started when the process group is open, closed at the end of the run; does nothing for a single rank."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds: what a collective may wait."""
        self.limit = PATIENCE * timeout
        # Rank 0 reads every beat, hence more time for many ranks.
        self.interval = min(max(0.2, timeout / 20), max(1.0, min(5.0, distributed.world_size() / 100)))
        self.heard: dict[int, Heard] = {}
        self._count, self._place, self._since = 0, None, time.monotonic()
        self._answered = time.monotonic()
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        self._store: Any = None

    def start(self) -> None:
        """Collective: every rank has left its first beat when this returns."""
        if distributed.world_size() == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's is busy while the main thread waits in it.
        self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(1.0, self.limit)))
        self._leave_beat()
        distributed.barrier()
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """This rank has nothing more to do and is not to be missed."""
        if self._store is not None and not self._closed.is_set():
            self._closed.set()
            try:
                self._leave_beat(done=True)
            except (RuntimeError, OSError):
                logger.debug("the store is gone before this rank")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the error of a collective into `RankLost` that names the rank to blame."""
        try:
            yield
        except RuntimeError as error:
            # A checkpoint that the loss of a rank has interrupted says so in its cause.
            cause = error.__cause__ or error
            if self._store is None or not any(word in str(cause).lower() for word in CONNECTION):
                raise
            raise RankLost(f"{self.diagnosis()}; the checkpoints are intact ({first_line(cause)})") from error
        finally:
            self.close()

    def diagnosis(self) -> str:
        """Who is to blame for a collective that failed here, from beats over four intervals; takes that long."""
        before = self._read_all()
        time.sleep(4 * self.interval)
        after = self._read_all()
        if not before or not after:
            return "rank 0, or the process that holds its store, is gone"
        silent = [rank for rank in after if not after[rank].done and after[rank].count == before[rank].count]
        if silent:
            return "; ".join(f"rank {rank} is gone or stopped ({_describe(after[rank])})" for rank in silent)
        busy = [rank for rank in after if not after[rank].done and not after[rank].waits and rank != distributed.rank()]
        blamed = [rank for rank in busy if after[rank].seconds >= 4 * self.interval] or list(after)
        return "; ".join(f"rank {rank}: {_describe(after[rank])}" for rank in blamed)

    def _exchange(self) -> None:
        while not self._closed.wait(self.interval):
            try:
                self._leave_beat()
                self._hear(range(distributed.world_size()) if distributed.is_main() else [0])
            except (RuntimeError, OSError):
                return
            self._answered = time.monotonic()

    def _judge(self) -> None:
        while not self._closed.wait(self.interval):
            now = time.monotonic()
            if now - self._answered > self.limit and not distributed.is_main():
                self._give_up(
                    f"rank 0 has not answered for {now - self._answered:.0f} s: it is gone, stopped or cut off"
                )
            for rank, heard in list(self.heard.items()):
                if rank != distributed.rank() and not heard.beat.done and now - heard.at > self.limit:
                    self._give_up(f"rank {rank} has given no sign for {now - heard.at:.0f} s ({_describe(heard.beat)})")

    def _give_up(self, what: str) -> None:
        """End this rank, whatever its main thread waits for; the launcher ends the others."""
        if self._closed.is_set():
            return
        line = f"error: {what}; the checkpoints are intact\n"
        with suppress(OSError):  # a terminal that was closed
            os.write(sys.stderr.fileno(), line.encode())
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
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        self._count += 1
        process = f"process {os.getpid()} on {socket.gethostname()}"
        beat = Beat(self._count, process, where, round(time.monotonic() - self._since, 1), waits, done)
        self._store.set(_key(distributed.rank()), json.dumps(asdict(beat)))


def locate(frame: FrameType | None) -> tuple[Any, str, bool]:
    """(the exact place, the function there in words, whether it is inside a collective).

    The innermost function of this package is named; outside of it, the innermost of all.
    """
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
