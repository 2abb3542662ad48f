"""Detecting texts in both the training and the validation split, against Python sets."""

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data import overlap as overlaps
from clex_train.data.overlap import Overlap, overlap, require_disjoint
from clex_train.token_store.manifest import MANIFEST, Manifest, TokenizerInfo, partial_path
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import ShardWriter, move_store, write_store
from clex_train.utils.files import write_atomically


def store_of_hashes(path: Path, splits: dict[str, list[list[int]]]) -> Path:
    """Write a store whose documents have the given text hashes, shard by shard."""
    partial_path(path).mkdir(parents=True)
    shards: dict[str, list] = {"train": [], "validation": []}
    for split, groups in splits.items():
        for number, hashes in enumerate(groups):
            with ShardWriter(partial_path(path) / split, f"{number:05d}", np.dtype("<u2")) as writer:
                for record, value in enumerate(hashes, start=1):
                    writer.add(np.array([1, 0]), value, source=0, record=record)
                shards[split].append(writer.close())
    write_atomically(
        partial_path(path) / MANIFEST, Manifest("<u2", TokenizerInfo(2, "-", "0", 0), shards).to_json().encode()
    )
    move_store(partial_path(path), path)
    return path


# Few values, some equal in their first 22 bits, make duplicates and near misses common.
hashes = st.one_of(st.integers(0, 30), st.integers(0, 3).map(lambda i: (1 << 63) + i))
shards = st.lists(st.lists(hashes, min_size=1, max_size=12), max_size=4)


@settings(max_examples=60)
@given(train=shards, held_out=shards, chunk=st.integers(1, 20))
def test_the_overlap_equals_that_of_python_sets(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], held_out: list[list[int]], chunk: int
) -> None:
    path = store_of_hashes(tmp_path_factory.mktemp("s") / "store", {"train": train, "validation": held_out})
    left, right = TokenStore(path), TokenStore(path, "validation")
    a, b = [h for shard in train for h in shard], [h for shard in held_out for h in shard]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlaps, "CHUNK_DOCUMENTS", chunk)
        found = overlap(left, right)
    shared = set(a) & set(b)
    if not shared:
        assert found is None
    else:
        value = min(shared)
        assert found == Overlap(sum(h in shared for h in b), a.index(value), b.index(value))


def test_a_shared_document_is_refused_with_both_places_and_a_remedy(tmp_path: Path) -> None:
    write_store(tmp_path / "train", {"train": [[1, 2], [3, 4], [5]]}, vocab_size=10)
    write_store(tmp_path / "held", {"validation": [[7], [3, 4]]}, vocab_size=10)
    with pytest.raises(ValueError, match="1 of its 2 validation documents are also training documents") as raised:
        require_disjoint([TokenStore(tmp_path / "train")], TokenStore(tmp_path / "held", "validation"))
    line = str(raised.value)
    assert "\n" not in line
    assert "document 1, in training document 1;" in line
    assert "choose another store with evaluation.path" in line
    assert "python -m data_prep decontaminate" in line
    assert "evaluation.allow_overlap=true" in line


def test_an_allowed_shared_document_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlaps.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("clex_train"), "propagate", True)
    write_store(tmp_path / "store", {"train": [[1, 2]], "validation": [[1, 2]]}, vocab_size=10)
    require_disjoint([TokenStore(tmp_path / "store")], TokenStore(tmp_path / "store", "validation"), allow_overlap=True)
    assert "1 of its 1 validation documents are also training documents" in caplog.text


def test_only_the_smaller_split_is_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store_of_hashes(tmp_path / "store", {"train": [list(range(100))], "validation": [[1000, 50]]})
    read = TokenStore.text_hashes

    def small_only(store: TokenStore) -> np.ndarray:
        assert store.split_name == "validation"
        return read(store)

    monkeypatch.setattr(TokenStore, "text_hashes", small_only)
    assert overlap(TokenStore(path), TokenStore(path, "validation")) == Overlap(1, 50, 1)
