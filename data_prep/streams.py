"""Opens plain, gzip and zstandard files as binary streams that fail, and do not just end, when they are cut short."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

COMPRESSIONS = (".gz", ".zst")
_INPUT_BYTES = 1 << 16
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` writes, the most the format's own tool reads


class DamagedStream(ValueError):
    """A compressed file that is truncated or corrupt."""


@contextmanager
def open_stream(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (content, raw): the decompressed stream by the file's suffix, and the file, whose `tell` shows progress.

    Raises:
        DamagedStream: while reading, if the compressed file is truncated or corrupt.
    """
    with open(path, "rb") as raw:
        if str(path).endswith(".zst"):
            yield cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 18)), raw
        elif str(path).endswith(".gz"):
            yield cast(BinaryIO, io.BufferedReader(_GzipReader(raw), 1 << 18)), raw
        else:
            yield raw, raw


class _GzipReader(io.RawIOBase):
    """gzip's errors, all of them, as `DamagedStream`."""

    def __init__(self, raw: BinaryIO) -> None:
        self._content = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._content.readinto(buffer)
        except (EOFError, OSError, zlib.error) as error:
            raise DamagedStream(f"gzip stream is truncated or corrupt ({error}); fetch the file again") from error


class _ZstdReader(io.RawIOBase):
    """Frame after frame. zstandard's own stream reader takes a truncated frame for the end of the file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._frame = self._context.decompressobj()
        self._between_frames = True
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._raw.read(_INPUT_BYTES)
            if not chunk:
                if not self._between_frames:
                    raise DamagedStream("zstandard stream is truncated; fetch the file again")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            try:
                parts.append(self._frame.decompress(chunk))
            except zstandard.ZstdError as error:
                raise DamagedStream(f"zstandard stream is corrupt ({error}); fetch the file again") from error
            self._between_frames, chunk = self._frame.eof, self._frame.unused_data
            if self._between_frames:
                self._frame = self._context.decompressobj()
        return b"".join(parts)
