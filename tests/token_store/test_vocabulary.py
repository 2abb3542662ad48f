"""Vocabulary checks: the tokenizer must match the store, and token ids must fit the embedding."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clex_train.token_store import vocabulary as vocabulary_of_store
from clex_train.token_store.manifest import TOKENIZER
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import (
    check_bos,
    check_embedding,
    check_ids,
    check_tokenizer,
    vocabulary,
    vocabulary_sha256,
)
from clex_train.token_store.writer import write_store
from clex_train.utils import distributed


def word_level(tokens: list[str], added: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.add_special_tokens(list(added))
    return tokenizer


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    write_store(tmp_path / "store", {"train": [[1, 2]]}, vocab_size=4)
    (tmp_path / "store" / TOKENIZER).mkdir()
    word_level(["0", "1", "2", "3"]).save(str(tmp_path / "store" / TOKENIZER / "tokenizer.json"))
    return TokenStore(tmp_path / "store")


def test_a_matching_tokenizer_is_accepted_as_object_and_as_directory(store: TokenStore, tmp_path: Path) -> None:
    same = word_level(["0", "1", "2", "3"])
    check_tokenizer(store, same)
    check_tokenizer(store, store.tokenizer_path)
    same.save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(store, str(tmp_path))


def test_padding_and_truncation_settings_do_not_matter(store: TokenStore) -> None:
    same = word_level(["0", "1", "2", "3"])
    same.enable_truncation(128)
    same.enable_padding(length=16)
    check_tokenizer(store, same)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (word_level(["0", "2", "1", "3"]), "id 1 is '1' in the store and '2' there"),
        (word_level(["0", "1", "2"]), "4 and 3 tokens; id 3 is '3' in the store and None there"),
        (word_level(["0", "1", "2", "3"], added=("<pad>",)), "4 and 5 tokens; id 4 is None in the store and '<pad>'"),
    ],
)
def test_another_vocabulary_is_refused_with_the_first_difference(
    store: TokenStore, other: Tokenizer, difference: str
) -> None:
    with pytest.raises(ValueError, match=difference) as caught:
        check_tokenizer(store, other)
    assert "\n" not in str(caught.value)


def test_a_changed_tokenizer_copy_inside_the_store_is_detected(store: TokenStore) -> None:
    word_level(["0", "1", "2", "9"]).save(str(store.tokenizer_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="own tokenizer directory was modified"):
        check_tokenizer(store, store.tokenizer_path)


def test_object_and_file_have_the_same_vocabulary(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    for tokenizer in (word_level(["x", "y"], added=("<s>", "</s>")), unigram):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert vocabulary(tmp_path) == vocabulary(tokenizer)


def test_the_hash_does_not_depend_on_the_order_of_a_dict() -> None:
    assert vocabulary_sha256({"a": 0, "b": 1}) == vocabulary_sha256({"b": 1, "a": 0})
    assert vocabulary_sha256({"a": 0, "b": 1}) != vocabulary_sha256({"a": 1, "b": 0})


def test_a_directory_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        vocabulary(tmp_path)


def small_store(folder: Path, documents: list[list[int]], vocab_size: int, eos_id: int = 0) -> TokenStore:
    write_store(folder, {"train": documents}, vocab_size, eos_id)
    return TokenStore(folder)


def test_an_id_outside_the_embedding_is_named(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store", [[1, 2], [3, 299, 1]], vocab_size=512)
    check_embedding(store, 512, "a/model")
    check_embedding(store, 300, "a/model")
    with pytest.raises(
        ValueError, match=r"data\.path=.*: it has the id 299, but the embedding of a/model has 299 rows"
    ):
        check_embedding(store, 299, "a/model")


def test_unused_ids_outside_the_embedding_are_accepted(tmp_path: Path, monkeypatch) -> None:
    """Scan the whole store for its largest id; an added padding token that no document has is fine."""
    monkeypatch.setattr(vocabulary_of_store, "SPAN", 3)
    check_embedding(small_store(tmp_path / "padded", [[1] * 10], vocab_size=301), 300, "a/model")
    store = small_store(tmp_path / "last", [[1] * 10, [300]], vocab_size=301)
    with pytest.raises(ValueError, match="it has the id 300"):
        check_embedding(store, 300, "a/model")


def test_an_eos_outside_the_embedding_is_named(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store", [[1, 2]], vocab_size=512, eos_id=511)
    with pytest.raises(ValueError, match=r"its EOS is 511, but the embedding of a/model has 511 rows"):
        check_embedding(store, 511, "a/model")


def test_a_bos_outside_the_embedding_is_refused_if_documents_begin_with_it(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store", [[1, 2]], vocab_size=512)
    manifest = store.manifest
    info = replace(manifest.tokenizer, bos_token="511", bos_id=511)
    store.manifest = replace(manifest, tokenizer=info, bos=False)
    check_embedding(store, 511, "a/model")
    store.manifest = replace(manifest, tokenizer=info, bos=True)
    with pytest.raises(ValueError, match=r"its BOS is 511, but the embedding of a/model has 511 rows"):
        check_embedding(store, 511, "a/model")
    check_bos(None, 511, "a/model")
    check_bos(510, 511, "a/model")
    with pytest.raises(ValueError, match=r"^evaluation\.bos: BOS is 511, .* 511 rows .*; set evaluation\.bos=never"):
        check_bos(511, 511, "a/model")


def test_a_store_is_scanned_by_one_rank_and_named_by_its_key(tmp_path: Path, monkeypatch) -> None:
    store = small_store(tmp_path / "store", [[1, 299]], vocab_size=512)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    check_embedding(store, 299, "a/model")
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(ValueError, match=r"^evaluation\.path=.*: it has the id 299"):
        check_embedding(store, 299, "a/model", "evaluation.path")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level([*"abcd"], added=("</s>",)), eos_token="</s>")
    check_ids(tokenizer, 5, "a/model")
    with pytest.raises(ValueError, match=r"^model\.path=a/model: its tokenizer's EOS is 4, .* has 4 rows"):
        check_ids(tokenizer, 4, "a/model")
    tokenizer.eos_token = None
    check_ids(tokenizer, 4, "a/model")
    with pytest.raises(ValueError, match=r"its tokenizer's last id is 3, but its embedding has 3 rows"):
        check_ids(tokenizer, 3, "a/model")
