"""The validation split of a small corpus: a function of its content only, and reported by each program."""

import logging
from pathlib import Path

import pytest

from clex_train.token_store.store import TokenStore
from data_prep import export, train_tokenizer
from data_prep.config import CorpusConfig, CorpusVerb, OnBadRecord
from data_prep.corpus import held_out
from data_prep.corpus.documents import hash64
from data_prep.corpus.sources import plan
from tests.data_prep.small_corpora import files_of, stored_texts, tokenize_files, write_jsonl


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {i} of the corpus"} for i in range(count)]


def held_out_texts(tokenizer_dir: Path, folder: Path, records: list, **settings) -> set[str]:
    path = write_jsonl(folder / "a.jsonl", records)
    store = tokenize_files([path], tokenizer_dir, folder / "store", **{"validation_share": 0.001, **settings})
    view = TokenStore(store.path, "validation")
    return set(stored_texts(view)) if view.num_documents else set()


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 1), (4, 2), (10, 2), (30, 3), (45, 4), (100, 4)])
def test_a_small_corpus_holds_out_those_with_the_smallest_hashes(
    tmp_path: Path, tokenizer_dir: Path, count: int, expected: int
) -> None:
    records = texts(count)
    found = held_out_texts(tokenizer_dir, tmp_path, records, validation_share=1e-6)
    by_hash = sorted((record["text"] for record in records), key=lambda text: hash64(text.encode()))
    assert found == set(by_hash[:expected])


def test_a_growing_corpus_only_moves_documents_into_training(tmp_path: Path, tokenizer_dir: Path) -> None:
    before = held_out_texts(tokenizer_dir, tmp_path / "10", texts(10))
    for count in (12, 15, 19):
        now = held_out_texts(tokenizer_dir, tmp_path / f"{count}", texts(count))
        assert now & {record["text"] for record in texts(10)} <= before
        before |= now


def test_a_share_that_gives_enough_documents_is_used_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(400))
    corpus = CorpusConfig(paths=[str(path)], validation_share=0.1)
    assert held_out.rule(corpus, plan(corpus, 1 << 30)) == held_out.HeldOut(0.1 * 2.0**64)


def test_duplicates_count_once_and_bad_records_do_not_count(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [*texts(10), *texts(3), "{", *texts(3)]
    found = held_out_texts(tokenizer_dir, tmp_path, records, on_bad_record=OnBadRecord.skip)
    assert found == held_out_texts(tokenizer_dir, tmp_path / "once", texts(10))
    assert caplog.text.count("left out: ") == 1


def test_the_bytes_do_not_depend_on_workers_and_a_second_run_does_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"{i} " + "word " * 100_000}]) for i in range(5)]
    stores = [
        tokenize_files(paths, tokenizer_dir, tmp_path / f"store{n}", workers=n, shard_mb=1, validation_share=0.01)
        for n in (1, 2)
    ]
    assert files_of(stores[0].path) == files_of(stores[1].path)
    assert stores[0].manifest.num_documents("validation") == 2
    assert stores[0].manifest.split_rule["held_out"]["raised_to"] == 2
    before = (stores[0].path / "manifest.json").stat().st_mtime_ns
    tokenize_files(paths, tokenizer_dir, stores[0].path, shard_mb=1, validation_share=0.01)
    assert (stores[0].path / "manifest.json").stat().st_mtime_ns == before


def test_the_tokenizer_is_not_trained_on_held_out_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    found = held_out_texts(tokenizer_dir, tmp_path, texts(10))
    corpus = CorpusConfig(paths=[str(tmp_path / "a.jsonl")], validation_share=0.001)
    read = set(train_tokenizer._texts(plan(corpus, 1 << 30), corpus, 1 << 30))
    assert len(found) == 2
    assert read == {record["text"] for record in texts(10)} - found


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (
            1,
            "no document is held out, so this store cannot be used for evaluation: raise corpus.validation_share=0.001",
        ),
        (3, "only 1 document is held out, too few for error bars: raise corpus.validation_share=0.001"),
        (10, "corpus.validation_share=0.001 of 10 documents is too few for error bars: 2 are held out"),
    ],
)
def test_the_number_of_validation_documents_is_reported(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture, count: int, line: str
) -> None:
    with caplog.at_level(logging.INFO, "data_prep"):
        held_out_texts(tokenizer_dir, tmp_path, texts(count))
    assert line in caplog.text


def test_an_empty_corpus_is_refused_by_every_verb_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "set": "x"}])
    corpus = CorpusConfig(paths=[str(path)], where={"set": "y"})
    with pytest.raises(ValueError, match=r"no record became a document \(1 filtered\)"):
        export.run(CorpusVerb(corpus=corpus, output=str(tmp_path / "out.jsonl")))
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match=r"no record became a document \(1 filtered\)"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", where={"set": "y"})
    assert stored_texts(tokenize_files([path], tokenizer_dir, tmp_path / "store", where={"set": "x"})) == ["a"]
