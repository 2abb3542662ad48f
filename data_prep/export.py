"""`corpus`: write any corpus as one file of {"text", "meta"} lines, the layout of RedPajama."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from clex_train.utils import log
from clex_train.utils.files import publish
from data_prep.config import CorpusVerb
from data_prep.corpus.documents import documents, require_documents
from data_prep.corpus.sources import Unit, plan
from data_prep.corpus.utf8 import printable
from data_prep.resume import disk_full_explained, require_free, require_writable

logger = log.get(__name__)


def run(config: CorpusVerb) -> None:
    """Write the file under a temporary name and rename it when it is complete.

    Raises:
        InputError: the corpus cannot be read, or the output exists or is not writable.
    """
    output = Path(config.output)
    require_free(output, "file", config.overwrite)
    # One unit of everything: the output is a single file, and its order must not depend on sharding.
    units = plan(config.corpus, 1 << 62)
    with disk_full_explained(output):
        _write(output, units, config)


def _write(output: Path, units: list[Unit], config: CorpusVerb) -> None:
    counts: Counter[str] = Counter()
    unfinished = output.with_name(output.name + ".partial")
    require_writable(output)
    try:
        with open(unfinished, "wb") as file, _compressed(file, output) as stream:
            for piece in (piece for unit in units for piece in unit.pieces):
                for document in documents(piece, config.corpus, counts, keep=["meta"]):
                    origin = {"path": printable(piece.path)}
                    record = {"text": document.text, "meta": document.fields.get("meta", origin)}
                    stream.write(_line(record))
        require_documents(config.corpus, counts)
        # Reopened because the compressor has closed its stream; publish flushes the file to disk, then renames it.
        with open(unfinished, "r+b") as written:
            publish(written, output)
    finally:
        unfinished.unlink(missing_ok=True)
    logger.info("%s is complete: %d documents", output, counts["documents"])


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
