"""Synthetic retrieval documents: deterministic, answerable only from their first statement, free of held-out text."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clex_train.config.data import DataConfig, DomainConfig, Packing
from clex_train.data.build import build_rows, pack
from clex_train.data.rows import PADDING
from clex_train.retrieval.words import ADJECTIVES, NOUNS
from clex_train.token_store.store import TokenStore
from data_prep.config import CorpusConfig
from data_prep.corpus.documents import documents
from data_prep.corpus.held_out import rule
from data_prep.corpus.sources import plan
from data_prep.corpus.streams import open_stream
from data_prep.retrieval_text import run as retrieval_text
from data_prep.retrieval_text.config import (
    MOST_DISTRACTORS,
    STATEMENT_CHARS,
    RetrievalKind,
    RetrievalTextVerb,
    RowTokenizer,
)
from data_prep.retrieval_text.draft import ATTRIBUTES, THREE_DIGITS
from data_prep.retrieval_text.filler import Filler
from tests.data_prep.small_corpora import tokenize_files, write_jsonl

NUM_BOOKS, SEQ_LEN = 24, 300
STATEMENTS = [RetrievalKind.passkey, RetrievalKind.repeat]


def book(number: int) -> str:
    """Write a text whose every sentence names its number."""
    return " ".join(f"In book<{number}> the river — bends {'very ' * (i % 7)}slowly." for i in range(80))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """Write books, about half of which are held out."""
    path = tmp_path_factory.mktemp("corpus") / "books.jsonl"
    write_jsonl(path, [{"text": book(number)} for number in range(NUM_BOOKS)])
    return CorpusConfig(paths=[str(path)], validation_share=0.5)


def write(output: Path, corpus: CorpusConfig, **keys: Any) -> list[dict[str, Any]]:
    """Run the verb and return its records."""
    retrieval_text.run(RetrievalTextVerb(corpus=corpus, output=str(output), **({"num_documents": 200} | keys)))
    with open_stream(output) as (content, _):
        return [json.loads(line) for line in content]


def splits_of(corpus: CorpusConfig) -> dict[int, str]:
    """Return the split of each book by its number, as `tokenize` decides it."""
    units = plan(corpus, 1 << 62)
    below = rule(corpus, units).below
    pieces = [piece for unit in units for piece in unit.pieces]
    found = [d for piece in pieces for d in documents(piece, corpus, Counter(), below=below)]
    return {int(d.text.partition("book<")[2].partition(">")[0]): d.split for d in found}


def test_equal_seeds_give_equal_bytes_and_a_larger_number_only_adds_documents(
    tmp_path: Path, corpus: CorpusConfig
) -> None:
    first = write(tmp_path / "a.jsonl.zst", corpus)
    write(tmp_path / "b.jsonl.zst", corpus)
    assert (tmp_path / "a.jsonl.zst").read_bytes() == (tmp_path / "b.jsonl.zst").read_bytes()
    assert write(tmp_path / "c.jsonl", corpus, num_documents=300)[:200] == first
    other = write(tmp_path / "d.jsonl", corpus, seed=1)
    assert all(one["text"] != two["text"] for one, two in zip(first, other, strict=True))
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.parametrize("distractors", [0, 3])
def test_an_answer_stands_only_in_its_statement_and_in_the_repetition(
    tmp_path: Path, corpus: CorpusConfig, distractors: int
) -> None:
    records = write(tmp_path / "a.jsonl", corpus, distractors=distractors, min_chars=300)
    for text, meta in ((record["text"], record["meta"]) for record in records):
        assert 300 - len("slowly. ") * 2 <= len(text) <= 400
        if meta["kind"] == "quote":
            quoted = meta["answer"]
            assert text.startswith(f"{quoted}\n\n")
            assert text.endswith(f"\n\n{quoted}")
            assert meta["distance"] == len(text) - 2 * len(quoted)
            assert len(text) // 5 <= len(quoted) <= len(text) // 2
            continue
        if meta["kind"] == "passkey":
            key = meta["answer"]
            stated, asked = f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?"
            assert text.count(key) == 3
            assert text.endswith(f" {asked} The pass key is {key}.")
            start = text.index(stated) + len(stated)
            assert meta["distance"] == text.index(asked) - start
        else:
            before, answer, after = text.partition(meta["answer"])
            assert after.count(answer) == 1
            stated = f"{before[before.rindex('The ') :]}{answer}."
            assert text.count(stated) == 2
            assert meta["distance"] == text.rindex(stated) - text.index(stated) - len(stated)
            # Statements about other things have other values.
            assert text.count("The ") == 2 + distractors


def test_kinds_take_turns(tmp_path: Path, corpus: CorpusConfig) -> None:
    passkey, repeat = RetrievalKind.passkey, RetrievalKind.repeat
    records = write(tmp_path / "a.jsonl", corpus, kinds=[passkey, repeat, repeat], num_documents=6)
    assert [record["meta"]["kind"] for record in records] == ["passkey", "repeat", "repeat"] * 2


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_filler_is_training_text_only(tmp_path: Path, corpus: CorpusConfig, share: float) -> None:
    # At 1 %, the rule for small corpora holds out two books: the verb must apply it, not the share alone.
    corpus = CorpusConfig(paths=corpus.paths, validation_share=share)
    splits = splits_of(corpus)
    assert "validation" in splits.values()
    text = "".join(record["text"] for record in write(tmp_path / "a.jsonl", corpus))
    found = {number for number in range(NUM_BOOKS) if f"book<{number}>" in text}
    assert found == {number for number, split in splits.items() if split == "train"}


def test_sources_name_the_books_of_the_filler(tmp_path: Path, corpus: CorpusConfig) -> None:
    for record in write(tmp_path / "a.jsonl", corpus, num_documents=50):
        # Records of the file are counted from 1, books from 0.
        books = {int(source.rpartition(" ")[2]) - 1 for source in record["meta"]["sources"]}
        assert {n for n in range(NUM_BOOKS) if f"book<{n}>" in record["text"]} <= books


def test_distances_are_uniform_up_to_all_of_the_filler(tmp_path: Path, corpus: CorpusConfig) -> None:
    length = {"min_chars": 2000, "max_chars": 2000, "distractors": 0}
    records = write(tmp_path / "a.jsonl", corpus, num_documents=1000, kinds=STATEMENTS, **length)
    for kind in ("passkey", "repeat"):
        distances = np.sort([r["meta"]["distance"] for r in records if r["meta"]["kind"] == kind]) / 1900
        # The Kolmogorov-Smirnov distance of 500 uniform draws is below 0.073 in 99 % of cases; sentences add 0.02.
        assert np.abs(distances - (np.arange(500) + 0.5) / 500).max() < 0.1, kind


def test_text_without_spaces_has_statements_at_every_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "橋を渡る" * 1000}])
    records = write(
        tmp_path / "a.jsonl", CorpusConfig(paths=[str(path)], validation_share=0.0), num_documents=40, kinds=STATEMENTS
    )
    places = {record["text"].index(record["meta"]["answer"]) for record in records}
    assert len(places) > 30


def test_passages_begin_and_end_at_words_and_continue_in_the_next_document() -> None:
    filler = Filler(["Ünë. Zwei drei.".encode(), "Vier fünf sechs sieben acht.".encode()], ["a", "b"])
    rng = np.random.default_rng(0)
    passages = [filler.passage(rng, 16) for _ in range(100)]
    words = {word.strip(".") for passage in passages for word in passage.text.split()}
    assert words <= {"Ünë", "Zwei", "drei", "Vier", "fünf", "sechs", "sieben", "acht"}
    assert all(0 < len(passage.text) <= 16 for passage in passages)
    assert {passage.sources for passage in passages} >= {("b",), ("a", "b"), ("b", "a")}
    # Text without spaces or full stops has no other place to begin than the one that was drawn.
    chinese = Filler([("橋を渡る" * 1000).encode()], ["c"])
    assert len({chinese.passage(rng, 16).text[:4] for _ in range(50)}) == 4


def test_no_statement_is_longer_than_its_share_of_min_chars() -> None:
    longest = [max(map(len, words)) for words in (ATTRIBUTES, NOUNS, ADJECTIVES, [*NOUNS, *THREE_DIGITS])]
    written = "The {} of the {} is {}-{}. ".format(*("x" * n for n in longest))
    assert len(written) <= STATEMENT_CHARS
    assert len(ATTRIBUTES) * len(NOUNS) > MOST_DISTRACTORS


def test_documents_of_at_most_max_tokens_stay_whole_in_rows_at_the_share_of_the_mixture(
    tmp_path: Path, corpus: CorpusConfig, bos_tokenizer_dir: Path
) -> None:
    tokenizer = RowTokenizer(str(bos_tokenizer_dir))
    records = write(tmp_path / "r.jsonl", corpus, tokenizer=tokenizer, max_tokens=SEQ_LEN)
    retrieval = tokenize_files([tmp_path / "r.jsonl"], bos_tokenizer_dir, tmp_path / "retrieval")
    lengths = np.diff(retrieval.doc_offsets)
    # The limit is met with BOS and EOS, and it matters: without it, documents of this corpus are longer.
    assert len(lengths) == len(records) == 200
    assert SEQ_LEN / 2 < lengths.min() <= lengths.max() <= SEQ_LEN
    free = write(tmp_path / "f.jsonl", corpus)
    assert [record["text"] for record in free] != [record["text"] for record in records]
    books = tokenize_files(corpus.paths, bos_tokenizer_dir, tmp_path / "books", validation_share=0.5)
    _check_mixture({"books": books, "retrieval": retrieval})


def _check_mixture(stores: dict[str, TokenStore]) -> None:
    domains = {"books": DomainConfig(weight=90), "retrieval": DomainConfig(weight=10)}
    data = DataConfig(domains=domains, packing=Packing.best_fit, seq_len=SEQ_LEN)
    rows = build_rows(pack(stores, data), data, seed=0, batch_rows=16)
    whole = {tuple(stores["retrieval"].tokens(start, stop)) for _, start, stop in stores["retrieval"].documents()}
    num_retrieval = 0
    for index in range(500):
        row = rows[index]
        parts = [tuple(row.tokens[row.segments == n]) for n in set(row.segments.tolist()) - {PADDING}]
        num_retrieval += parts[0] in whole
        # A row of retrieval text is one document from BOS to EOS.
        assert len(parts) == 1 or not whole & set(parts)
    assert abs(num_retrieval - 50) <= 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output": "a.csv"}, "must end in .jsonl"),
        ({"min_chars": 100}, "min_chars=100: at least 192"),
        ({"min_chars": 300, "max_chars": 200}, "max_chars=200: at least min_chars=300"),
        ({"kinds": []}, "name at least one kind"),
        ({"num_documents": 0}, "num_documents=0: at least 1"),
        ({"max_tokens": 128}, "name the tokenizer to count max_tokens with"),
        ({"tokenizer": RowTokenizer("x")}, "only for max_tokens"),
    ],
)
def test_unusable_values_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalTextVerb(**keys)


def test_a_corpus_without_enough_training_text_is_refused(tmp_path: Path, corpus: CorpusConfig) -> None:
    for share, message in ((1.0, "no training documents"), (0.5, "have only")):
        held_out = CorpusConfig(paths=corpus.paths, validation_share=share)
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "a.jsonl", held_out, max_chars=10**7)
    assert not list(tmp_path.iterdir())


def test_filler_of_statements_and_a_limit_that_no_document_meets_are_refused(
    tmp_path: Path, corpus: CorpusConfig, tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "statements.jsonl", [{"text": "The pass key is 12345. " * 100}])
    with pytest.raises(ValueError, match="take filler from real text"):
        write(tmp_path / "a.jsonl", CorpusConfig(paths=[str(path)], validation_share=0.0))
    with pytest.raises(ValueError, match=r"max_tokens=20: no passkey document of 240 characters fits"):
        write(tmp_path / "a.jsonl", corpus, tokenizer=RowTokenizer(str(tokenizer_dir)), max_tokens=20)
    assert not (tmp_path / "a.jsonl").exists()
