"""A model directory that appears complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_or_absent(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `directory` when the block ends without an error."""
    beside = directory.with_name("saving_" + directory.name)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    replaced = directory.with_name("replaced_" + directory.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    beside.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
