"""Files with flipped bits or a missing end: a one-line error or the right texts, never a crash or other texts."""

import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.config import CorpusConfig
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import Piece

TEXTS = [f"word{i} " * random.Random(i).randint(1, 40) for i in range(200)]
NUM_DAMAGES = 60
FOOTER = 1500
"""Bytes at the end of a file that give sizes, where damage has the largest effect."""


def as_parquet(compression: str) -> bytes:
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression=compression, row_group_size=50, write_page_checksum=True)
    return buffer.getvalue()


def as_lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


MAKE = {
    "none.parquet": lambda: as_parquet("none"),
    "snappy.parquet": lambda: as_parquet("snappy"),
    "zstd.parquet": lambda: as_parquet("zstd"),
    "a.jsonl.gz": lambda: gzip.compress(as_lines()),
    "a.jsonl.zst": lambda: zstandard.ZstdCompressor(write_checksum=True).compress(as_lines()),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return content[: rng.randrange(len(content))]
    damage = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        first = 0 if rng.random() < 0.5 else max(0, len(content) - FOOTER)
        damage[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
    return bytes(damage)


@pytest.mark.parametrize("name", MAKE)
def test_a_damaged_file_gives_an_error_or_its_texts(tmp_path: Path, name: str) -> None:
    content, rng, path = MAKE[name](), random.Random(0), tmp_path / name
    outcomes = Counter[bool]()
    for _ in range(NUM_DAMAGES):
        path.write_bytes(damaged(content, rng))
        found, message = read(path)
        outcomes[message is None] += 1
        assert found == TEXTS[: len(found)], "a text that was never written"
        assert message is None or (message.startswith(str(path)) and "\n" not in message)
    assert outcomes[False] > NUM_DAMAGES / 4


def read(path: Path) -> tuple[list[str], str | None]:
    """Return the texts read before an error, and the message of the error."""
    piece = Piece(str(path), "parquet" if path.suffix == ".parquet" else "jsonl", 0, path.stat().st_size)
    found: list[str] = []
    try:
        found.extend(document.text for document in documents(piece, CorpusConfig(paths=["-"]), Counter()))
    except ValueError as error:
        return found, str(error)
    return found, None
