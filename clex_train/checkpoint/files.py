"""SHA-256 of files as they are written and as they lie on disk, and folders that go away whole."""

import hashlib
import shutil
from pathlib import Path
from typing import BinaryIO

from clex_train import log
from clex_train.files import open_regular

logger = log.get(__name__)


class HashingFile:
    """A binary file that is only written forwards; it knows the digest of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; `OSError` if there is no room."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far."""
        return self._digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on disk, in hexadecimal."""
    with open_regular(path, within=path.parent) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a folder; under another name first, so that a kill in between leaves nothing that looks like damage."""
    doomed = folder if folder.name.startswith("removing_") else folder.with_name(f"removing_{folder.name}")
    try:
        if folder.exists() and doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s)", folder, error)
