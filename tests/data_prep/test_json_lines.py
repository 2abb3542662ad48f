"""The streaming parser for long JSON lines, against Python's json at every block boundary."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.corpus import json_lines, utf8
from data_prep.corpus.utf8 import Utf8
from tests.data_prep.small_corpora import COMPRESS

ROOT = Path(__file__).resolve().parents[2]

fragments = st.sampled_from(["\\", '"', "\n", "\x00", "é", "橋", "🌉", "a", "bcdefghijklmnop", "/", "\u2028", "\ufffd"])
texts = st.lists(fragments, max_size=60).map("".join)


@settings(max_examples=200)
@given(text=texts, ascii_only=st.booleans(), block_bytes=st.integers(16, 50))
@example(text="🌉" * 50, ascii_only=True, block_bytes=16)
@example(text="\\" * 99, ascii_only=True, block_bytes=17)
def test_a_string_is_unescaped_the_same_for_every_cut(text: str, ascii_only: bool, block_bytes: int) -> None:
    string = json.dumps(text, ensure_ascii=ascii_only).encode()[1:-1]
    assert json_lines.unescape(memoryview(string), block_bytes) == text.encode()


@settings(max_examples=200)
@given(content=st.lists(st.sampled_from([b"\\", b"u", b"d83d", b"\\ude00", b"n", b'"', b"\xe9", b"a", b"\t"])))
def test_an_invalid_json_string_is_never_returned(content: list[bytes]) -> None:
    """Compare at every cut: Python's text, or an error where Python has one (or gives half of a surrogate pair)."""
    string = b"".join(content)
    try:
        expected = json.loads(b'"%b"' % string).encode()
    except ValueError:
        expected = None
    for block_bytes in (16, 17, 23, 1000):
        try:
            found = json_lines.unescape(memoryview(string), block_bytes)
        except ValueError:
            found = None
        assert found == expected


@pytest.mark.parametrize("text_field", ["text", "doc.body", "doc"])
def test_only_a_long_text_field_stays_undecoded(text_field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"text": "a \\ b", "doc": {"body": "🌉\n", "n": 1}, "meta": {"text": "c"}, "body": [1, "d"]}
    line = json.dumps(record).encode() + b"\r\n"
    assert json_lines.parse(line, text_field) == record
    monkeypatch.setattr(json_lines, "LONG_BYTES", 0)
    expected: dict[str, Any] = {
        "text": {"text": Utf8(b"a \\ b")},
        "doc.body": {"doc": {"body": Utf8("🌉\n".encode()), "n": 1}},
        "doc": {},
    }
    assert json_lines.parse(line, text_field) == record | expected[text_field]


def test_lines_that_only_pythons_parser_accepts_are_accepted() -> None:
    line = b'{"text": "a", "a": NaN, "b": 123456789012345678901234567890, "c": 1e999, "d": "\\ud83d"}'
    found = json_lines.parse(line, "text")
    assert math.isnan(found.pop("a"))
    assert found == {"text": "a", "b": 123456789012345678901234567890, "c": math.inf, "d": "\ud83d"}


@settings(max_examples=100)
@given(text=texts, block_bytes=st.integers(1, 20))
def test_blocks_consist_of_whole_characters_and_cover_the_text(text: str, block_bytes: int) -> None:
    found = list(utf8.blocks(text.encode(), block_bytes))
    assert "".join(found) == text
    assert all(len(block.encode()) <= max(block_bytes, 4) for block in found)


def test_a_byte_that_is_not_utf8_is_named_in_every_block() -> None:
    content = b"first\n" + b"x" * 50 + b"\xe9 and more"
    for block_bytes in (4, 7, 13, 50, 1000):
        with pytest.raises(ValueError, match=r"byte 51 of line 2 is 0xe9"):
            list(utf8.blocks(content, block_bytes))


LONG_BYTES = 200_000_000
READ = """
import resource, sys
from collections import Counter
from data_prep.config import CorpusConfig
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import plan
import pyarrow.parquet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
corpus, before = CorpusConfig(paths=[sys.argv[1]]), peak()
for unit in plan(corpus, 1 << 40):
    for piece in unit.pieces:
        for document in documents(piece, corpus, Counter()):
            print(document.text_hash, document.text_bytes, (peak() - before) / document.text_bytes)
"""


def write_long(folder: Path, suffix: str, text: str) -> Path:
    """Write one document to a file of the kind of the suffix, in a layout that exercises its reader."""
    path = folder / f"long{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        return path
    content = text.encode() if ".txt" in suffix else json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "times"),
    [(".jsonl", 3), (".jsonl.gz", 3), (".jsonl.zst", 3), (".txt", 3), (".txt.zst", 3), (".parquet", 5)],
)
def test_reading_a_document_of_200_mb_takes_three_times_its_bytes(tmp_path: Path, suffix: str, times: int) -> None:
    """Include an emoji, so that a str takes four times the bytes and parsing twice that; five times for Parquet."""
    line = "It was a bright cold day in April, and the clocks were striking thirteen.\n"
    text = line * (LONG_BYTES // len(line)) + "🌉"
    path = write_long(tmp_path, suffix, text)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, num_bytes, ratio = done.stdout.split()
    assert int(num_bytes) == len(text.encode())
    assert float(ratio) < times
