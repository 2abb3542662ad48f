"""Evaluation sets: long documents of the validation split, all or a stable selection, with their origins."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from clex_train.evaluation.windows import select
from clex_train.token_store.manifest import MANIFEST, partial_path
from clex_train.token_store.store import TokenStore
from data_prep import evaluation_sets, inspect
from data_prep.config import EvaluationSetsVerb
from tests.data_prep.small_corpora import TEXTS, files_of, stored_texts, tokenize_files, write_jsonl


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TokenStore:
    """Tokenize documents of 1 to 40 sentences in three files into several shards, half for validation."""
    folder = tmp_path_factory.mktemp("long")
    paths: list[Path | str] = [
        write_jsonl(folder / f"{name}.jsonl.gz", [{"text": f"{name}{i} " + TEXTS[0] * i} for i in range(1, 41)])
        for name in "abc"
    ]
    return tokenize_files(paths, tokenizer_dir, folder / "store", validation_share=0.5).split("validation")


def write(store: TokenStore, output: Path, **keys: object) -> None:
    evaluation_sets.run(EvaluationSetsVerb(store=str(store.path), output=str(output), **keys))  # type: ignore[arg-type]


def origins_by_text(store: TokenStore) -> dict[str, tuple[str, int]]:
    """Map the text of each document to its origin and hash."""
    hashes = store.text_hashes().tolist()
    return {text: (store.origin(i), hashes[i]) for i, text in enumerate(stored_texts(store))}


def nth_smallest_length(store: TokenStore, index: int) -> int:
    """Return the index-th smallest document length."""
    return int(np.sort(np.diff(store.doc_offsets))[index])


def test_a_set_has_exactly_the_documents_of_at_least_its_length_with_origins(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_sets, "CHUNK_TOKENS", 13)
    lengths = [nth_smallest_length(store, 5), nth_smallest_length(store, -3)]
    write(store, tmp_path / "sets", lengths=lengths)
    sizes = np.diff(store.doc_offsets).tolist()
    texts, known = stored_texts(store), origins_by_text(store)
    for length in lengths:
        found = TokenStore(tmp_path / "sets" / str(length), "validation")
        assert stored_texts(found) == [text for text, size in zip(texts, sizes, strict=True) if size >= length]
        assert origins_by_text(found) == {text: known[text] for text in stored_texts(found)}
        assert int(np.diff(found.doc_offsets).min()) == length, "a document of just the length, EOS included, is in"
        assert found.manifest.settings["evaluation_set"]["store_fingerprint"] == store.fingerprint
        assert found.manifest.settings["evaluation_set"]["min_tokens"] == length
        assert TokenStore(found.path).num_documents == 0
        assert inspect.verify(found) == 3 + len(list(found.tokenizer_path.iterdir()))
        assert len(select(found, length, found.num_documents).documents) == found.num_documents


def test_a_larger_selection_includes_every_smaller_one(store: TokenStore, tmp_path: Path) -> None:
    known = origins_by_text(store)
    length = nth_smallest_length(store, 10)
    long_enough = {text for text, size in zip(known, np.diff(store.doc_offsets), strict=True) if size >= length}
    before: set[str] = set()
    for count in (1, 4, 9):
        write(store, tmp_path / str(count), lengths=[length], max_documents=count)
        found = set(stored_texts(TokenStore(tmp_path / str(count) / str(length), "validation")))
        assert found == set(sorted(long_enough, key=lambda text: known[text][1])[:count])
        assert before < found
        before = found
    write(store, tmp_path / "again", lengths=[length], max_documents=9)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "9")
    for text, (_, hash_) in known.items():
        assert hash_ == int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_a_length_without_documents_is_refused_before_anything_is_written(store: TokenStore, tmp_path: Path) -> None:
    longest = nth_smallest_length(store, -1)
    message = rf"lengths=\[{longest + 1}\]: none of the {store.num_documents} .* longest has {longest}, EOS included"
    with pytest.raises(ValueError, match=rf"{message}\); use lengths=\[8, {longest}\]"):
        write(store, tmp_path / "sets", lengths=[longest, longest + 1, 8])
    assert not (tmp_path / "sets").exists()
    with pytest.raises(ValueError, match=rf"use lengths of at most {longest}, or use another store"):
        write(store, tmp_path / "sets", lengths=[longest + 5])


def test_a_finished_set_is_kept_and_a_different_request_is_refused(store: TokenStore, tmp_path: Path) -> None:
    write(store, tmp_path, lengths=[64])
    before, stamp = files_of(tmp_path), (tmp_path / "64" / MANIFEST).stat().st_mtime_ns
    write(store, tmp_path, lengths=[64])
    assert (tmp_path / "64" / MANIFEST).stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"exists with other content .*max_documents was None, is 2"):
        write(store, tmp_path, lengths=[32, 64], max_documents=2)
    assert files_of(tmp_path) == before, "nothing is written for the other length either"
    write(store, tmp_path, lengths=[64], max_documents=2, overwrite=True)
    assert TokenStore(tmp_path / "64", "validation").num_documents == 2


def test_an_interrupted_set_is_unusable_until_the_same_request_finishes_it(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, tmp_path / "whole", lengths=[64])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_sets, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(store, tmp_path / "sets", lengths=[64])
    assert partial_path(tmp_path / "sets" / "64").exists()
    with pytest.raises(ValueError, match="interrupted; run the same"):
        TokenStore(tmp_path / "sets" / "64")
    write(store, tmp_path / "sets", lengths=[64])
    assert files_of(tmp_path / "sets") == files_of(tmp_path / "whole")


def test_a_moved_store_is_the_same_request(store: TokenStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "moved")
    write(store, tmp_path / "sets", lengths=[64])
    before = files_of(tmp_path / "sets")
    write(TokenStore(tmp_path / "moved", "validation"), tmp_path / "sets", lengths=[64])
    assert files_of(tmp_path / "sets") == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output": "x"}, "store: name the directory of a token store"),
        ({"store": "x"}, "output: name the directory to write the sets in"),
        ({"store": "nowhere", "output": "x"}, "^store=nowhere: no such directory"),
    ],
)
def test_a_missing_name_is_reported_in_one_line(
    keys: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluation_sets.run(EvaluationSetsVerb(**keys))


@pytest.mark.parametrize("keys", [{"lengths": []}, {"lengths": [1]}, {"max_documents": 0}])
def test_a_value_out_of_range_is_refused(keys: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(keys))}="):
        EvaluationSetsVerb(**keys)
