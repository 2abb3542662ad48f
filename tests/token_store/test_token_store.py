"""The token store: reading and writing over shards, and one-line errors for unusable stores."""

import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.concat_packing import ConcatRows
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store.manifest import (
    BLOCK,
    BLOCK_SUM,
    DOCUMENT,
    MANIFEST,
    Manifest,
    TokenizerInfo,
    partial_path,
    token_dtype,
)
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import ShardWriter, move_store, write_store
from clex_train.utils.files import write_atomically

SHARDS = [[[5, 6, 7], [8]], [[9] * 10], [[1], [2], [3, 4]]]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Write a store of three training shards; EOS is 0."""
    partial = partial_path(tmp_path / "store")
    shards = []
    for number, documents in enumerate(SHARDS):
        with ShardWriter(partial / "train", f"{number:05d}", token_dtype(100)) as writer:
            for record, ids in enumerate(documents, start=1):
                writer.add(np.array([*ids, 0]), text_hash=10 * number + record, source=number, record=record)
            shards.append(writer.close())
    manifest = Manifest("<u2", TokenizerInfo(100, "-", "0", 0), {"train": shards, "validation": []})
    write_atomically(partial / MANIFEST, manifest.to_json().encode())
    move_store(partial, tmp_path / "store")
    return tmp_path / "store"


def joined() -> list[int]:
    return [token for shard in SHARDS for document in shard for token in [*document, 0]]


def test_every_span_over_shards_equals_that_of_the_joined_list(sharded: Path) -> None:
    store, expected = TokenStore(sharded), joined()
    assert store.num_tokens == len(expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            assert store.tokens(start, stop).tolist() == expected[start:stop]


def test_documents_are_the_spans_between_offsets(sharded: Path) -> None:
    store = TokenStore(sharded)
    documents = [document for shard in SHARDS for document in shard]
    assert store.doc_offsets.dtype == np.int64
    assert store.doc_offsets.tolist() == np.cumsum([0, *(len(d) + 1 for d in documents)]).tolist()
    spans = list(store.documents())
    assert [doc_id for doc_id, _, _ in spans] == list(range(len(documents)))
    assert [store.tokens(start, stop).tolist() for _, start, stop in spans] == [[*d, 0] for d in documents]


def test_min_tokens_counts_the_end_of_document(sharded: Path) -> None:
    store = TokenStore(sharded)
    assert [doc_id for doc_id, _, _ in store.documents(min_tokens=3)] == [0, 2, 5]
    assert list(store.documents(min_tokens=12)) == []


def test_a_document_records_its_origin(tmp_path: Path, sharded: Path) -> None:
    manifest = json.loads((sharded / MANIFEST).read_text())
    manifest["sources"] = [
        {"path": f"{n}.jsonl", "start": n * 100, "stop": 1000, "sha256": None, "counts": {}} for n in range(3)
    ]
    (sharded / MANIFEST).write_text(json.dumps(manifest))
    store = TokenStore(sharded)
    assert store.origin(1) == "0.jsonl: record 2"
    assert store.origin(5) == "2.jsonl (from byte 200): record 3"
    assert store.text_hashes().tolist() == [1, 2, 11, 21, 22, 23]


def test_spans_beyond_the_end_are_refused(sharded: Path) -> None:
    store = TokenStore(sharded)
    for start, stop in ((-1, 2), (3, 2), (0, store.num_tokens + 1)):
        with pytest.raises(IndexError):
            store.tokens(start, stop)


@settings(max_examples=30)
@given(documents=st.lists(st.lists(st.integers(0, 70_000), max_size=20), min_size=1, max_size=12))
def test_any_documents_read_back_equal(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("any") / "store"
    write_store(path, {"train": documents}, vocab_size=70_001, eos_id=70_000)
    store = TokenStore(path)
    assert store.dtype == np.uint32
    assert [store.tokens(a, b).tolist() for _, a, b in store.documents()] == [[*d, 70_000] for d in documents]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (128_256, "<u4")])
def test_the_dtype_is_the_smallest_that_fits_the_largest_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_splits_are_separate(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2]], "validation": [[3], [4]]}, vocab_size=10)
    store = TokenStore(tmp_path / "store")
    assert store.num_tokens == 3
    assert store.split("validation").num_documents == 2
    assert store.split("validation").split("train").tokens(0, 3).tolist() == [1, 2, 0]


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        write_store(tmp_path / name, {"train": [ids]}, vocab_size=10)
    a, b, c = (TokenStore(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_sparse_store_of_ten_billion_tokens_opens_at_once(tmp_path: Path) -> None:
    """Read only the bytes that a row needs, from a sparse file too large to be read whole."""
    write_store(tmp_path / "store", {"train": [[1]]}, vocab_size=10)
    shard = tmp_path / "store" / "train" / "00000.tokens"
    table = np.array([(10**10, 0, 0, 1)], DOCUMENT).tobytes()
    sums = np.full(-(-2 * 10**10 // BLOCK), zlib.crc32(bytes(BLOCK)), BLOCK_SUM)
    sums[-1] = zlib.crc32(bytes(2 * 10**10 % BLOCK))
    shard.with_suffix(".documents").write_bytes(table)
    shard.with_suffix(".blocks").write_bytes(sums.tobytes())
    os.truncate(shard, 2 * 10**10)
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    manifest["splits"]["train"][0] |= {
        "num_tokens": 10**10,
        "documents_sha256": hashlib.sha256(table).hexdigest(),
        "blocks_sha256": hashlib.sha256(sums.tobytes()).hexdigest(),
    }
    (tmp_path / "store" / MANIFEST).write_text(json.dumps(manifest))
    rows = ShuffledRows(ConcatRows(TokenStore(tmp_path / "store"), seq_len=4096), seed=0)
    assert len(rows) == 10**10 // 4096
    assert rows[10**7].tokens.shape == (4096,)


def damage_missing(store: Path) -> Path:
    return store.with_name("nowhere")


def damage_not_a_store(store: Path) -> Path:
    (store / MANIFEST).unlink()
    return store


def damage_half_written(store: Path) -> Path:
    store.rename(partial_path(store))
    (partial_path(store) / MANIFEST).unlink()
    return store


def damage_a_file(store: Path) -> Path:
    return store / MANIFEST


def damage_other_json(store: Path) -> Path:
    (store / MANIFEST).write_text('{"format": "something else"}')
    return store


def damage_not_json(store: Path) -> Path:
    (store / MANIFEST).write_text("{")
    return store


def damage_future(store: Path) -> Path:
    manifest = json.loads((store / MANIFEST).read_text()) | {"version": 99}
    (store / MANIFEST).write_text(json.dumps(manifest))
    return store


def damage_missing_key(store: Path) -> Path:
    manifest = json.loads((store / MANIFEST).read_text())
    del manifest["tokenizer"]
    (store / MANIFEST).write_text(json.dumps(manifest))
    return store


def damage_truncated(store: Path) -> Path:
    os.truncate(store / "train" / "00000.tokens", 4)
    return store


def damage_lost_file(store: Path) -> Path:
    (store / "train" / "00000.documents").unlink()
    return store


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "no such directory"),
        (damage_not_a_store, "not a token store"),
        (damage_half_written, "interrupted; run the same"),
        (damage_a_file, "not a directory"),
        (damage_other_json, "not that of a token store"),
        (damage_not_json, "not that of a token store"),
        (damage_future, "version 99, this program reads versions 1 and 2"),
        (damage_missing_key, "manifest.json is damaged"),
        (damage_truncated, "00000.tokens: has 4 bytes instead of the 8 in the manifest"),
        (damage_lost_file, "00000.documents: is missing"),
    ],
)
def test_an_incomplete_store_is_reported_in_one_line(tmp_path: Path, damage, message: str) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2, 3]]}, vocab_size=10)
    path = damage(tmp_path / "store")
    with pytest.raises(ValueError, match=message) as caught:
        TokenStore(path)
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)


def test_an_empty_split_is_refused_with_a_remedy(sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"no validation documents; tokenize again with .* corpus.validation_share"):
        TokenStore(sharded).split("validation")


def test_an_error_while_writing_leaves_no_shard_behind(tmp_path: Path) -> None:
    def broken() -> None:
        with ShardWriter(tmp_path, "00000", token_dtype(10)) as writer:
            writer.add(np.array([1, 0]), text_hash=0, source=0, record=1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_the_dtype_are_never_wrapped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "00000", token_dtype(10)) as writer, pytest.raises(AssertionError, match="do not fit"):
        writer.add(np.array([70_000, 0]), text_hash=0, source=0, record=1)
