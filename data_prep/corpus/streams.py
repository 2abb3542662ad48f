"""Open plain and compressed files as binary streams that raise an error if the file is truncated."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

_INPUT_BYTES = 1 << 16
_MAX_WINDOW = 1 << 31  # `zstd --long=31`, the largest window that the zstd tool itself accepts


class DamagedStream(ValueError):
    """A compressed file is truncated or corrupt."""


def compression(path: str | Path) -> str:
    """Return the suffix of a file's name that is in `COMPRESSIONS`, in lower case; else an empty string."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


@contextmanager
def open_stream(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (content, raw): the decompressed stream, and the file itself, whose `tell` shows progress.

    Raises:
        DamagedStream: while reading, if a compressed file is truncated or corrupt.
    """
    with open(path, "rb") as raw:
        suffix = compression(path)
        if suffix:
            yield cast(BinaryIO, io.BufferedReader(COMPRESSIONS[suffix](raw), 1 << 18)), raw
        else:
            yield raw, raw


class _LibraryReader(io.RawIOBase):
    """Reader that turns all errors of a standard library decompressor into `DamagedStream`."""

    def __init__(self, name: str, content: io.BufferedIOBase) -> None:
        self._name, self._content = name, content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._content.readinto(buffer)
        # Each library has its own: gzip raises EOFError or zlib.error, bz2 OSError, lzma LZMAError.
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise DamagedStream(
                f"{self._name} stream is truncated or corrupt ({error}); fetch the file again"
            ) from error


class _ZstdReader(io.RawIOBase):
    """Reader of concatenated zstandard frames; zstandard's stream reader takes a truncated frame for the end."""

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
            # One file may have many frames (pzstd, or files joined by cat); the rest of the chunk is the next one.
            self._between_frames, chunk = self._frame.eof, self._frame.unused_data
            if self._between_frames:
                self._frame = self._context.decompressobj()
        return b"".join(parts)


COMPRESSIONS: dict[str, Callable[[BinaryIO], io.RawIOBase]] = {
    ".gz": lambda raw: _LibraryReader("gzip", gzip.GzipFile(fileobj=raw)),
    ".bz2": lambda raw: _LibraryReader("bzip2", bz2.BZ2File(raw)),
    ".xz": lambda raw: _LibraryReader("xz", lzma.LZMAFile(raw)),  # noqa: SIM115  closed with the file below it
    ".zst": _ZstdReader,
    ".zstd": _ZstdReader,
}
"""Function that opens a file, by the last suffix of its name."""
