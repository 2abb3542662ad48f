"""Streaming data sets of the Hugging Face hub, with a local directory in the layout of the hub."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from clex_train.token_store.store import TokenStore
from data_prep.config import CorpusConfig, CorpusSource, OnBadRecord, TokenizerConfig, TokenizeVerb
from data_prep.corpus import hub
from data_prep.tokenize.run import run
from tests.data_prep.small_corpora import TEXTS, files_of, stored_texts, write_jsonl

CARD = """---
configs:
- config_name: book
  data_files:
  - split: train
    path: book/train-*
  - split: test
    path: book/test-*
---
A data set.
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "dataset"
    for part in range(5):
        write_jsonl(root / "book" / f"train-{part}.jsonl.zst", [{"text": f"{part} {text}"} for text in TEXTS])
    write_jsonl(root / "book" / "test-0.jsonl.zst", [{"text": "held out"}])
    (root / "README.md").write_text(CARD)
    return root


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    """Write a data set of parquet files without a card, with splits by file name."""
    (tmp_path / "columns" / "data").mkdir(parents=True)
    for part, texts in enumerate((TEXTS, ["a", "", "b"])):
        table = pyarrow.table({"content": texts})
        pyarrow.parquet.write_table(table, tmp_path / "columns" / "data" / f"train-{part:05d}-of-00002.parquet")
    return tmp_path / "columns"


def tokenize(dataset: Path, tokenizer_dir: Path, output: Path, workers: int = 1, **settings: Any) -> TokenStore:
    corpus = CorpusConfig(source=CorpusSource.hub, hub=str(dataset), validation_share=0.0, **settings)
    run(TokenizeVerb(corpus=corpus, tokenizer=TokenizerConfig(str(tokenizer_dir)), output=str(output), workers=workers))
    return TokenStore(output)


def test_a_wrong_text_column_is_refused_with_the_existing_columns(
    dataset: Path, columns: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"no field 'text', .* has 'content'; set corpus\.text_field=NAME, one of these"
    ):
        tokenize(columns, tokenizer_dir, tmp_path / "store")
    with pytest.raises(ValueError, match=r"no field 'language', .* has 'content'; set corpus\.where to one of these"):
        tokenize(columns, tokenizer_dir, tmp_path / "store", text_field="content", where={"language": "en"})


def test_chat_data_is_recognised(tokenizer_dir: Path, tmp_path: Path) -> None:
    messages = pyarrow.table({"messages": [[{"role": "user", "content": "hello"}]], "id": [1]})
    (tmp_path / "chat").mkdir()
    pyarrow.parquet.write_table(messages, tmp_path / "chat" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"has 'messages', 'id'; 'messages' looks like chat data"):
        tokenize(tmp_path / "chat", tokenizer_dir, tmp_path / "store")


def test_only_needed_columns_are_read(columns: Path) -> None:
    table = pyarrow.table({"content": ["a"], "meta": ["m"], "image": ["i"]})
    (columns / "data" / "train-00001-of-00002.parquet").unlink()
    pyarrow.parquet.write_table(table, columns / "data" / "train-00000-of-00002.parquet")
    corpus = CorpusConfig(source=CorpusSource.hub, hub=str(columns))
    for optional, expected in (([], {"content"}), (["meta"], {"content", "meta"}), (["none"], {"content"})):
        (record,) = hub.read_part(corpus, 0, 1, ["content"], optional)
        assert record.keys() == expected


def test_a_subset_is_streamed_in_the_order_of_its_files(dataset: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    store = tokenize(dataset, tokenizer_dir, tmp_path / "store", hub_subset="book")
    assert stored_texts(store) == [f"{part} {text}" for part in range(5) for text in TEXTS]
    assert len(store.manifest.splits["train"]) == 5
    assert store.origin(6).endswith("dataset (part 1 of 5): record 2")


def test_workers_share_the_parts(dataset: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    alone = tokenize(dataset, tokenizer_dir, tmp_path / "alone", hub_subset="book")
    shared = tokenize(dataset, tokenizer_dir, tmp_path / "shared", workers=2, hub_subset="book")
    assert files_of(alone.path) == files_of(shared.path)


def test_another_split_has_other_texts(dataset: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    test = tokenize(dataset, tokenizer_dir, tmp_path / "test", hub_subset="book", hub_split="test")
    assert stored_texts(test) == ["held out"]


def test_parquet_columns_are_streamed(columns: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    skip = OnBadRecord.skip
    store = tokenize(columns, tokenizer_dir, tmp_path / "store", text_field="content", on_bad_record=skip)
    assert stored_texts(store) == [*TEXTS, "a", "b"]


@pytest.mark.parametrize("settings", [{"hub_subset": "arxiv"}, {"hub_subset": "book", "hub_split": "dev"}])
def test_a_missing_subset_or_split_is_refused_in_one_line(
    dataset: Path, tokenizer_dir: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"corpus\.hub=.*dataset .*check the name") as caught:
        tokenize(dataset, tokenizer_dir, tmp_path / "store", **settings)
    assert "\n" not in str(caught.value)


def test_a_bad_row_is_named_by_part_and_row(columns: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns: part 1 of 2, row 2: field 'content' is empty"):
        tokenize(columns, tokenizer_dir, tmp_path / "store", text_field="content")


def test_a_file_that_breaks_while_streaming_is_named_by_part_and_row(
    dataset: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (dataset / "book" / "train-3.jsonl.zst").write_bytes(b"no zstandard")
    with pytest.raises(ValueError, match=r"dataset: part 3 of 5, row 1: reading failed") as caught:
        tokenize(dataset, tokenizer_dir, tmp_path / "store", hub_subset="book")
    assert "\n" not in str(caught.value)


def test_the_parts_cover_the_data_set(dataset: Path) -> None:
    corpus = CorpusConfig(source=CorpusSource.hub, hub=str(dataset), hub_subset="book")
    assert hub.num_shards(corpus) == 5
    for count in (1, 2, 5):
        texts = [record["text"] for part in range(count) for record in hub.read_part(corpus, part, count, ["text"])]
        assert texts == [f"{part} {text}" for part in range(5) for text in TEXTS]
