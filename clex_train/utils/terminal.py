"""Let a program outlive its terminal: once nobody can read standard output or error, what is written there is dropped.

A closed terminal answers each write with EIO and a pipe whose reader has gone with EPIPE; either would end a run in the
middle of the save that the SIGHUP before it has asked for, or make 120 of its exit code when Python flushes at the end.
"""

import errno
import io
import os
import sys
from typing import Any

READER_GONE = (errno.EIO, errno.EPIPE)


class _DropWhenClosed(io.FileIO):
    """The end of a stream; from the first write that nobody can read on it leads to the null device."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno(), inheritable=True)
            os.close(null)
            return len(data)


def survive_hangup(*names: str) -> None:
    """Do this for `stdout` or `stderr` of the process, before anything keeps a reference to them."""
    for name in names:
        stream = getattr(sys, name)
        # Under a test runner, or in a notebook, the stream is not the process's own.
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _rebuilt(stream))


def _rebuilt(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _DropWhenClosed(stream.fileno(), "w", closefd=False)
    # `python -u` has no buffer below the text.
    buffer: Any = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
