"""Readers of corpus files: records, numbering, compression, cuts and filters."""

from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.config import CorpusConfig, Format
from data_prep.corpus.documents import Document, documents
from data_prep.corpus.sources import Piece, plan
from data_prep.corpus.streams import DamagedStream, open_stream
from tests.data_prep.small_corpora import COMPRESS, TEXTS, jsonl, write_jsonl

RECORDS = [{"text": text, "meta": {"title": f"no. {i}"}} for i, text in enumerate(TEXTS)]


def read(paths: list[Path], shard_bytes: int = 1 << 40, **settings) -> list[Document]:
    corpus = CorpusConfig(paths=[str(path) for path in paths], **settings)
    pieces = [piece for unit in plan(corpus, shard_bytes) for piece in unit.pieces]
    return [document for piece in pieces for document in documents(piece, corpus, Counter(), keep=["meta"])]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd", ".xz", ".bz2", ".GZ"])
def test_json_lines_read_back_equal_for_every_compression(tmp_path: Path, suffix: str) -> None:
    found = read([write_jsonl(tmp_path / f"a.jsonl{suffix}", RECORDS)])
    assert [document.text for document in found] == TEXTS
    assert [document.record for document in found] == [1, 2, 3, 4, 5]
    assert [document.fields for document in found] == [{"meta": record["meta"]} for record in RECORDS]


def test_blank_lines_and_a_missing_last_newline_add_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(RECORDS[:2]) + b"\n  \n" + jsonl(RECORDS[2:3]).rstrip(b"\n"))
    found = read([tmp_path / "a.jsonl"])
    assert [document.text for document in found] == TEXTS[:3]
    assert [document.record for document in found] == [1, 2, 5]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(RECORDS[:1]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [document.text for document in read([tmp_path / "a.jsonl", tmp_path / "b.txt"])] == [TEXTS[0], "hello"]


@pytest.mark.parametrize("shard_bytes", [1, 7, 50, 211, 10_000])
def test_a_file_cut_anywhere_gives_every_line_once(tmp_path: Path, shard_bytes: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 3)
    assert [document.text for document in read([path], shard_bytes)] == TEXTS * 3


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path, suffix: str) -> None:
    text = "one\r\ntwo\n\n\tthree"
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert [document.text for document in read([tmp_path / f"a.txt{suffix}"])] == [text]


def test_parquet_rows_read_back_equal_over_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"content": TEXTS * 40, "other": list(range(200)), "meta": [{"a": 1}] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    found = read([tmp_path / "a.parquet"], text_field="content")
    assert [document.text for document in found] == TEXTS * 40
    assert found[150].record == 151
    assert found[0].fields == {"meta": {"a": 1}}, "columns that nothing names are not read"


def test_nested_fields_are_read_and_filtered(tmp_path: Path) -> None:
    records = [{"doc": {"body": f"text {i}"}, "meta": {"set": "book" if i % 2 else "web"}} for i in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    for file in (path, tmp_path / "b.parquet"):
        found = read([file], text_field="doc.body", where={"meta.set": "book"})
        assert [document.text for document in found] == ["text 1", "text 3", "text 5"]


def test_a_field_whose_name_has_a_dot_is_found_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"a.b": "whole name", "a": {"b": "nested"}}])
    assert read([path], text_field="a.b")[0].text == "whole name"


def test_the_format_can_be_given_instead_of_guessed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-0.data", RECORDS)
    assert [document.text for document in read([tmp_path / "part-0.data"], format=Format.jsonl)] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_streams_are_read_as_one(tmp_path: Path, suffix: str) -> None:
    parts = [bytes([65 + i]) * 100_000 for i in range(3)]
    (tmp_path / f"a{suffix}").write_bytes(b"".join(COMPRESS[suffix](part) for part in parts))
    with open_stream(tmp_path / f"a{suffix}") as (content, _):
        assert content.read() == b"".join(parts)


def test_a_long_zstandard_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    data = bytes(range(256)) * 4096
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(data))
    with open_stream(tmp_path / "a.zst") as (content, _):
        assert content.read() == data


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_cut_at_any_byte_fails_and_yields_only_its_beginning(tmp_path: Path, suffix: str) -> None:
    data = jsonl(RECORDS * 50)
    whole = COMPRESS[suffix](data)
    path = tmp_path / f"a{suffix}"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        got = b""
        with open_stream(path) as (content, _), pytest.raises(DamagedStream, match="truncated"):  # noqa: PT012
            while chunk := content.read(1000):
                got += chunk
        assert data.startswith(got)


def test_consumed_bytes_increase_to_the_size_of_the_piece(tmp_path: Path) -> None:
    for suffix in ("", ".gz", ".zst"):
        path = write_jsonl(tmp_path / f"a.jsonl{suffix}", RECORDS)
        consumed = [document.consumed for document in read([path])]
        assert consumed == sorted(consumed)
        assert consumed[-1] == path.stat().st_size


def test_the_shared_corpus_is_read_completely(shared_data: Path) -> None:
    """Compare with the figures of its README."""
    found = read([shared_data / "spec", shared_data / "code"])
    assert len(found) == 160
    assert sum(len(document.text) for document in found) == 4_319_443 + 3_998_943


def test_a_piece_names_its_reader() -> None:
    assert Piece("x", "hub", 3, 8).num_bytes == 0
    assert Piece("x", "jsonl", 3, 8).num_bytes == 5
