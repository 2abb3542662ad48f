"""Masks in a token store: every span reads back, damage is found, and earlier programs refuse the store."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.token_store.manifest import MANIFEST, Manifest, TokenizerInfo, partial_path, token_dtype
from clex_train.token_store.shard_files import DamagedStore
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import ShardWriter, move_store, write_store
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import write_atomically

SHARDS = [[[1, 0, 1, 1], [1, 0]], [[0] * 11], [[1] * 3, [0, 1], [0, 0, 1, 1, 0, 1, 0, 1]]]
"""Bits of the documents of three shards, none of which ends at a whole byte."""


def write_shards(path: Path, shards: list[list[list[int]]]) -> TokenStore:
    partial, written = partial_path(path), []
    for number, documents in enumerate(shards):
        with ShardWriter(partial / "train", f"{number:05d}", token_dtype(100), has_mask=True) as writer:
            for record, bits in enumerate(documents, start=1):
                writer.write(np.arange(1, len(bits) + 1), np.array(bits, np.bool_))
                writer.end_document(text_hash=record, source=0, record=record)
            written.append(writer.close())
    manifest = Manifest("<u2", TokenizerInfo(100, "-", "0", 0), {"train": written, "validation": []}, version=2)
    write_atomically(partial / MANIFEST, manifest.to_json().encode())
    move_store(partial, path)
    return TokenStore(path)


def test_every_span_of_the_mask_over_shards_equals_that_of_the_joined_list(tmp_path: Path) -> None:
    store = write_shards(tmp_path / "store", SHARDS)
    expected = [bool(bit) for shard in SHARDS for document in shard for bit in document]
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            scored = store.scored(start, stop)
            assert scored is not None
            assert scored.tolist() == expected[start:stop]


@settings(deadline=None, max_examples=25)
@given(bits=st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=20))
def test_any_mask_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, bits: list[list[bool]]) -> None:
    path = tmp_path_factory.mktemp("mask") / "store"
    write_store(path, {"train": [[5] * (len(b) - 1) for b in bits]}, 10, masks={"train": bits})
    store = TokenStore(path)
    scored = store.scored(0, store.num_tokens)
    assert scored is not None
    assert scored.tolist() == [bit for document in bits for bit in document]


def test_a_store_without_a_mask_has_none(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2]]}, 10)
    assert TokenStore(tmp_path / "store").scored(0, 3) is None


def test_the_fingerprint_depends_on_the_mask(tmp_path: Path) -> None:
    documents = {"train": [[1, 2, 3]]}
    stores = [tmp_path / name for name in ("plain", "one", "other", "same")]
    masks = [None, [[True, False, False, True]], [[True, True, False, True]], [[True, False, False, True]]]
    for store, mask in zip(stores, masks, strict=True):
        write_store(store, documents, 10, masks=None if mask is None else {"train": mask})
    plain, one, other, same = (TokenStore(store).fingerprint for store in stores)
    assert one == same
    assert len({plain, one, other}) == 3


def test_a_flipped_bit_of_the_mask_is_found_where_it_is_read(tmp_path: Path) -> None:
    bits = [bool(bit) for bit in np.random.default_rng(0).integers(0, 2, 300_000)]
    write_store(tmp_path / "store", {"train": [[1] * (len(bits) - 1)]}, 10, masks={"train": [bits]})
    file = tmp_path / "store/train/00000.mask"
    content = bytearray(file.read_bytes())
    content[20_000] ^= 4
    file.write_bytes(bytes(content))
    store = TokenStore(tmp_path / "store")
    intact = store.scored(0, 1000)
    assert intact is not None
    assert intact.tolist() == bits[:1000]
    with pytest.raises(DamagedStore, match=r"00000\.mask: damaged, block 1"):
        store.scored(160_000, 160_100)


@pytest.mark.parametrize("lost", ["mask", "mask_blocks"])
def test_a_missing_mask_is_refused_on_opening(tmp_path: Path, lost: str) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2]]}, 10, masks={"train": [[True, False, True]]})
    (tmp_path / f"store/train/00000.{lost}").unlink()
    with pytest.raises(DamagedStore, match=f"00000.{lost}: is missing"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize(("version", "drop"), [(1, False), (2, True)])
def test_a_manifest_that_hides_the_mask_is_refused(tmp_path: Path, version: int, drop: bool) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2]]}, 10, masks={"train": [[True, False, True]]})
    path = tmp_path / "store" / MANIFEST
    manifest = json.loads(path.read_text()) | {"version": version}
    if drop:
        manifest["splits"]["train"][0]["mask_sha256"] = ""
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="only some of its shards have a mask"):
        TokenStore(tmp_path / "store")
