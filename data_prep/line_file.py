"""Write a file of JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) under a temporary name, and rename it when complete."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from clex_train.utils.files import publish
from data_prep.resume import require_writable


@contextmanager
def line_file(output: Path) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Yield a function that appends a record; nothing remains if the block raises.

    Equal records give equal bytes, also compressed.

    Raises:
        ConfigError: `output` is not writable.
    """
    unfinished = output.with_name(output.name + ".partial")
    require_writable(output)
    try:
        with open(unfinished, "wb") as file, _compressed(file, output) as stream:
            yield lambda record: stream.write(_line(record))
        # Reopened because the compressor has closed its stream; publish flushes the file to disk, then renames it.
        with open(unfinished, "r+b") as written:
            publish(written, output)
    finally:
        unfinished.unlink(missing_ok=True)


def _line(record: dict[str, Any]) -> bytes:
    """Format a record as a line of JSON."""
    # backslashreplace: half of a surrogate pair in `meta` stays the escape that it was in the source.
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def _compressed(file: BinaryIO, output: Path) -> Iterator[BinaryIO]:
    if output.suffix == ".zst":
        with zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as stream:
            yield stream
    elif output.suffix == ".gz":
        # No file name and no time in the header: equal corpora give equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield cast(BinaryIO, stream)
    else:
        yield file
