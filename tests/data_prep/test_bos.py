"""BOS at the beginning of documents: by the tokenizer or the user, and recorded in the store."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from clex_train.config.bos import Bos
from clex_train.config.data import DataConfig, DomainConfig
from clex_train.data import build
from clex_train.data.bos import adds_bos, describe_bos
from clex_train.token_store.manifest import MANIFEST
from clex_train.token_store.store import TokenStore
from data_prep import evaluation_sets, inspect
from data_prep.config import EvaluationSetsVerb, InspectVerb
from data_prep.decontaminate.ngrams import WordReader
from tests.data_prep.small_corpora import TEXTS, tokenize_files, write_jsonl

LONG = [*TEXTS, "many words " * 20_000, "<s> not BOS but text"]


def documents(store: TokenStore) -> list[list[int]]:
    return [store.tokens(start, stop).tolist() for _, start, stop in store.documents()]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in LONG])


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_documents_equal_the_encoding_of_hugging_face_and_eos(
    corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path, tokenizer_dir: Path, engine: str
) -> None:
    """Compare the last text by its decoding: it has the letters of BOS, which Hugging Face would encode as BOS."""
    for directory, has_bos in ((bos_tokenizer_dir, True), (tokenizer_dir, False)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert adds_bos(tokenizer) is has_bos
        store = tokenize_files([corpus], directory, tmp_path / f"{has_bos}", engine=engine)
        *found, last = documents(store)
        assert found == [[*tokenizer(text)["input_ids"], store.eos_id] for text in LONG[:-1]]
        assert last.count(1) == int(has_bos)
        assert tokenizer.decode(last[int(has_bos) : -1]) == LONG[-1]
        assert (store.bos, describe_bos(store)) == (has_bos, f"{'a' if has_bos else 'no'} BOS, as the tokenizer does")


def test_bos_always_and_never_override_the_tokenizer(
    corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path, tokenizer_dir: Path
) -> None:
    own = tokenize_files([corpus], bos_tokenizer_dir, tmp_path / "own")
    always = tokenize_files([corpus], tokenizer_dir, tmp_path / "always", bos=Bos.always)
    never = tokenize_files([corpus], bos_tokenizer_dir, tmp_path / "never", bos=Bos.never)
    assert documents(always) == documents(own)
    assert documents(never) == [document[1:] for document in documents(own)]
    assert len({own.fingerprint, never.fingerprint}) == 2
    assert describe_bos(always) == "BOS, although the tokenizer adds none"
    assert describe_bos(never) == "no BOS, although the tokenizer adds one"


def test_bos_always_is_refused_for_a_tokenizer_without_bos(corpus: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"^bos=always: the tokenizer has no BOS token"):
        tokenize_files([corpus], tmp_path / "tokenizer", tmp_path / "store", bos=Bos.always)
    assert not tokenize_files([corpus], tmp_path / "tokenizer", tmp_path / "store").bos


def forget_bos(store: TokenStore) -> TokenStore:
    """Rewrite the manifest as earlier versions wrote it, without BOS."""
    content = json.loads((store.path / MANIFEST).read_text())
    del content["bos"], content["settings"]["bos"], content["tokenizer"]["adds_bos"]
    (store.path / MANIFEST).write_text(json.dumps(content))
    return TokenStore(store.path)


def test_a_store_of_an_earlier_version_has_no_bos(
    corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path, tokenizer_dir: Path
) -> None:
    store = tokenize_files([corpus], tokenizer_dir, tmp_path / "store")
    old = forget_bos(store)
    assert (old.bos, old.fingerprint) == (False, store.fingerprint)
    before = (old.path / MANIFEST).stat().st_mtime_ns
    tokenize_files([corpus], tokenizer_dir, tmp_path / "store")
    assert (old.path / MANIFEST).stat().st_mtime_ns == before, "the same request"
    forget_bos(tokenize_files([corpus], bos_tokenizer_dir, tmp_path / "other", bos=Bos.never))
    with pytest.raises(ValueError, match=r"exists with other content .*bos was False, is True"):
        tokenize_files([corpus], bos_tokenizer_dir, tmp_path / "other")


def test_evaluation_sets_and_the_report_of_a_store_keep_its_bos(
    corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tokenize_files([corpus], bos_tokenizer_dir, tmp_path / "store", validation_share=1.0)
    evaluation_sets.run(EvaluationSetsVerb(str(store.path), str(tmp_path / "sets"), [20]))
    chosen = TokenStore(tmp_path / "sets" / "20", "validation")
    assert chosen.bos
    assert all(document[0] == 1 for document in documents(chosen))
    inspect.run(InspectVerb(str(store.path), samples=7, rows=0))
    output = capsys.readouterr().out
    assert "documents    a BOS, as the tokenizer does" in output
    assert "'<s>It was a bright" in output


def test_bos_is_not_a_word_of_a_document(corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path, tokenizer_dir) -> None:
    stores = [tokenize_files([corpus], path, tmp_path / path.name) for path in (bos_tokenizer_dir, tokenizer_dir)]
    for doc_id in range(len(LONG)):
        words = [WordReader(store).words(doc_id).tolist() for store in stores]
        assert words[0] == words[1]


def test_a_mixture_of_documents_with_and_without_bos_is_refused(
    corpus: Path, tmp_path: Path, bos_tokenizer_dir: Path
) -> None:
    for name, bos in (("a", Bos.auto), ("b", Bos.never)):
        tokenize_files([corpus], bos_tokenizer_dir, tmp_path / name, bos=bos)
    domains = {name: DomainConfig(str(tmp_path / name)) for name in ("a", "b")}
    with pytest.raises(
        ValueError, match=r"data\.domains\.b\.path=.* no BOS, although .*tokenize both with the same bos="
    ):
        build.open_stores(DataConfig(domains=domains))
