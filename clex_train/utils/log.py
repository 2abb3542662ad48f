"""Logging for programs of many ranks: rank 0 speaks at INFO, the others from WARNING on, each line with its rank."""

import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from tqdm import tqdm

from clex_train.utils import ranks, terminal

MAX_BUFFERED = 10_000
"""Lines of a program that are kept before its opening block."""
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of a line: a terminal acts upon them."""


def printable(text: str) -> str:
    """Write what a terminal would act upon as escapes: names and texts of files may come from strangers."""
    return _TERMINAL_CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable(logging.Formatter):
    """A line that a terminal only shows."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class AboveProgressBars(logging.StreamHandler):
    """Writes to standard error above the bars of a terminal, which a plain write would break in two."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; where no bar is open it is a plain write."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup() -> None:
    """Configure the root logger of an entry point once; library chatter below WARNING is silenced."""
    terminal.survive_hangup("stderr")
    rank = ranks.display_rank()
    handler = _handler()
    handler.setFormatter(_Printable(f"%(asctime)s {f'[rank {rank}] ' if rank else ''}%(message)s", "%H:%M:%S"))
    # Passes every line on at once, but for those before the opening block.
    queue = MemoryHandler(0, target=handler)
    logging.basicConfig(level=logging.WARNING, handlers=[queue], force=True)
    for name in ("clex_train", "data_prep", "launch"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")


@contextmanager
def buffered() -> Iterator[None]:
    """Hold lines back until `flush`, or until the program ends without an opening block."""
    _set_capacity(MAX_BUFFERED)
    try:
        yield
    finally:
        flush()


def flush() -> None:
    """Write the lines that were held back, and every later one at once."""
    _set_capacity(0)


def _set_capacity(lines: int) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, MemoryHandler):
            handler.capacity, handler.flushLevel = lines, logging.CRITICAL
            handler.flush()


def _handler() -> logging.Handler:
    if not sys.stderr.isatty():
        return logging.StreamHandler(sys.stderr)
    # tqdm's own lock is shared with forked processes, and one that is killed would never let go of it.
    tqdm.set_lock(threading.RLock())
    return AboveProgressBars(sys.stderr)


def get(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)
