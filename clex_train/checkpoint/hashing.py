"""A binary file that computes its own SHA-256 while it is written."""

import hashlib
from typing import BinaryIO


class HashingFile:
    """Write-only, append-only wrapper around a binary file that tracks size and digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # Hashing on the way costs one pass over memory; hashing afterwards would read the file back from disk.
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`. Raises `OSError` when the disk is full."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Flush Python's buffer to the operating system, not to the disk."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything written so far."""
        return self._digest.hexdigest()
