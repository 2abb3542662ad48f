"""The progress bar of a verb that reads a corpus: bytes with the time left, the speed in MB and tokens a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_IN_A_LOG = 10.0


class Progress:
    """A context manager around one bar; `total_bytes` on disk, 0 if unknown (a streamed data set); `task` names it."""

    def __init__(self, total_bytes: int, task: str = "tokenise") -> None:
        self._total, self._task = total_bytes, task
        self._text_bytes = self._tokens = 0

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        # A log file gets a line now and then, a terminal one that moves.
        seconds = 0.5 if sys.stderr.isatty() else _SECONDS_IN_A_LOG
        self._bar = tqdm(total=self._total or None, unit="B", unit_scale=True, desc=self._task, mininterval=seconds)
        return self

    def advance(self, read_bytes: int, text_bytes: int, tokens: int) -> None:
        """Report bytes read from disk, bytes of text taken from them, and tokens."""
        self._text_bytes += text_bytes
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = f"{self._text_bytes / seconds / 1e6:.1f} MB/s text, {self._tokens / seconds / 1e3:.0f}k tokens/s"
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(read_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
