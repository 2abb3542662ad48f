"""Progress bar of a verb that reads a corpus: bytes, time left, MB of text and tokens per second."""

from __future__ import annotations

import time
from types import TracebackType

from clex_train.utils import progress


class Progress:
    """Progress bar as a context manager; `total_bytes` on disk is 0 if unknown (a streamed data set)."""

    def __init__(self, total_bytes: int, task: str = "tokenize") -> None:
        self._total, self._task = total_bytes, task
        self._text_bytes = self._tokens = 0

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._bar = progress.bar(self._total or None, self._task, unit="B", unit_scale=True)
        return self

    def advance(self, read_bytes: int, text_bytes: int, tokens: int) -> None:
        """Add bytes read from disk, bytes of text obtained from them, and tokens."""
        self._text_bytes += text_bytes
        self._tokens += tokens
        # Not zero: the first report may come within the resolution of the clock.
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = f"{self._text_bytes / seconds / 1e6:.1f} MB/s text, {self._tokens / seconds / 1e3:.0f}k tokens/s"
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(read_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
