"""What `inspect` prints is what the store holds, and a flipped bit is found."""

from pathlib import Path

import numpy as np
import pytest
from small_corpora import TEXTS, tokenize_files, write_jsonl

from clex_train.data.store import TokenStore
from clex_train.data.writer import write_store
from data_prep import inspect
from data_prep.config import InspectVerb


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path) -> TokenStore:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    return tokenize_files([path], tokenizer_dir, tmp_path / "store")


def test_the_report_has_counts_lengths_and_decoded_beginnings(
    store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect.run(InspectVerb(path=str(store.path), samples=5, sample_tokens=10_000, verify=True))
    report = capsys.readouterr().out
    assert f"5 documents, {store.num_tokens:,} tokens, 1 shards" in report
    assert store.fingerprint in report
    assert all(repr(text + "</s>") in report for text in TEXTS)
    assert "a.jsonl: record 3" in report
    assert "files verified" in report


def test_the_histogram_counts_every_document_and_token_once(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"train": [[1] * n for n in (0, 1, 2, 3, 6, 7, 100)]}, vocab_size=10)
    lines = inspect.length_histogram(TokenStore(tmp_path / "store"))
    rows = [line.split()[:4] for line in lines]
    found = {int(row[0]): (int(row[1]), int(row[3])) for row in rows}
    assert {power: count for power, (count, _) in found.items() if count} == {1: 1, 2: 2, 4: 2, 8: 1, 64: 1}
    assert sum(tokens for _, tokens in found.values()) == sum(n + 1 for n in (0, 1, 2, 3, 6, 7, 100))


@pytest.mark.parametrize("file", ["train/00000.tokens", "train/00000.documents", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_is_found_and_its_file_named(store: TokenStore, file: str) -> None:
    content = np.fromfile(store.path / file, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(store.path / file)
    with pytest.raises(ValueError, match=f"{file}: damaged"):
        inspect.verify(TokenStore(store.path))


def test_no_path_says_what_to_name() -> None:
    with pytest.raises(ValueError, match="path=None: name the directory of a token store"):
        inspect.run(InspectVerb())
