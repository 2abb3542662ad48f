"""Survival of a closed terminal: output that nobody can read any more is dropped instead of raising.

A closed terminal answers each write with EIO, a pipe whose reader has exited with EPIPE. Either would end a run in the
middle of the save that the preceding SIGHUP requested, or turn the exit code into 120 when Python flushes at exit.
"""

import errno
import io
import os
import sys
from typing import Any

READER_GONE = (errno.EIO, errno.EPIPE)


class _DropWhenClosed(io.FileIO):
    """Raw end of a stream that redirects itself to the null device at the first write that nobody can read."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            # Redirect the descriptor itself: C libraries and child processes write to it as well.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno(), inheritable=True)
            os.close(null)
            # Claim success, or the buffer above would keep the data and fail again at exit.
            return len(data)


def survive_hangup(*names: str) -> None:
    """Protect `stdout` or `stderr` of the process; call before anything keeps a reference to the stream."""
    for name in names:
        stream = getattr(sys, name)
        # Under a test runner or in a notebook, the stream is not the process's own.
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _rebuilt(stream))


def _rebuilt(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _DropWhenClosed(stream.fileno(), "w", closefd=False)
    # `python -u` has no buffer below the text layer.
    buffer: Any = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
