"""Logging for multi-rank programs: rank 0 logs from INFO, other ranks from WARNING, with their rank on each line."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from typing import TextIO

from tqdm import tqdm

from clex_train.utils import terminal

MAX_BUFFERED = 10_000
"""Lines of a program that are buffered before its run summary."""
MOST_DIGITS = 7
"""Digits of a rank."""
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters other than tab and newline, and bidirectional marks: a terminal acts on them."""

_KEYS_FOR_VLLM = re.compile(r"Unrecognized keys in .rope_parameters.*\{'(long|short)_mscale', '(long|short)_mscale'\}$")


def printable(text: str) -> str:
    """Escape characters that a terminal would act on; names and texts of files may come from strangers."""
    return _TERMINAL_CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable(logging.Formatter):
    """Formatter whose lines contain no terminal controls."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class AboveProgressBars(logging.StreamHandler[TextIO]):
    """Handler that writes to standard error above tqdm's progress bars, which a plain write would break."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a plain write where no bar is open."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup() -> None:
    """Configure the root logger of an entry point, once; library messages below WARNING are dropped."""
    terminal.survive_hangup("stderr")
    rank = display_rank()
    handler = _handler()
    handler.setFormatter(_Printable(f"%(asctime)s {f'[rank {rank}] ' if rank else ''}%(message)s", "%H:%M:%S"))
    # Capacity 0 passes every line on at once; `buffered` raises it until the run summary.
    queue = MemoryHandler(0, target=handler)
    # `force` replaces handlers that a library has installed already.
    logging.basicConfig(level=logging.WARNING, handlers=[queue], force=True)
    for name in ("clex_train", "data_prep", "launch"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("transformers.modeling_rope_utils").addFilter(is_for_the_user)
    # DeepSpeed calls collectives by names that newer torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")


def is_for_the_user(record: logging.LogRecord) -> bool:
    """Return False for transformers' warning about two keys that only vLLM reads, and that `final/` therefore has."""
    return _KEYS_FOR_VLLM.search(record.getMessage()) is None


@contextmanager
def buffered() -> Iterator[None]:
    """Buffer log lines until `flush`, so that the run summary comes first."""
    _set_capacity(MAX_BUFFERED)
    try:
        yield
    finally:
        flush()


def flush() -> None:
    """Write the buffered lines, and every later one at once."""
    _set_capacity(0)


def _set_capacity(lines: int) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, MemoryHandler):
            handler.capacity, handler.flushLevel = lines, logging.CRITICAL
            handler.flush()


def _handler() -> logging.Handler:
    """Return the handler that suits standard error."""
    if not sys.stderr.isatty():
        return logging.StreamHandler(sys.stderr)
    # tqdm's own lock is shared with forked processes, and one that is killed would never release it.
    tqdm.set_lock(threading.RLock())
    return AboveProgressBars(sys.stderr)


def get(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


def display_rank() -> int:
    """Return the rank for log prefixes and messages that one rank writes; 0 where the variable is not a number."""
    # Logging starts before validation, so this must not raise.
    text = os.environ.get("RANK", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else 0
