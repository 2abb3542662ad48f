"""Damaged token stores: one error line names the file and the place, on opening or when a row reads the damage."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from clex_train.data import step_batches
from clex_train.data.batch import MicroBatch
from clex_train.data.concat_packing import ConcatRows
from clex_train.token_store.manifest import BLOCK, DOCUMENT, MANIFEST
from clex_train.token_store.shard_files import DamagedStore
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from clex_train.utils import distributed

DOCUMENTS = [list(np.random.default_rng(i).integers(1, 1000, 50 + 37 * i)) for i in range(60)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", {"train": DOCUMENTS}, vocab_size=1000)
    return tmp_path / "store"


def _shard(store: Path, suffix: str) -> Path:
    return store / "train" / f"00000.{suffix}"


def _flip(path: Path, byte: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= mask
    path.write_bytes(content)


def _edit(store: Path, **fields: object) -> None:
    """Change the record of the shard in the manifest, as the sender of a store could."""
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["splits"]["train"][0] |= fields
    (store / MANIFEST).write_text(json.dumps(manifest))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remove_block_sums(store: Path) -> None:
    """Rewrite the store in the format of earlier versions, without checksums of blocks."""
    _shard(store, "blocks").unlink()
    manifest = json.loads((store / MANIFEST).read_text())
    del manifest["splits"]["train"][0]["blocks_sha256"]
    (store / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_tokens_is_detected_by_the_row_that_reads_it(store: Path, seed: int) -> None:
    path, draw = _shard(store, "tokens"), np.random.default_rng(seed)
    byte, bit = int(draw.integers(path.stat().st_size)), int(draw.integers(8))
    _flip(path, byte, 1 << bit)
    tokens = TokenStore(store)
    block = byte // BLOCK
    with pytest.raises(DamagedStore, match=rf"00000\.tokens: damaged, block {block} \(from byte {block * BLOCK}\)"):
        tokens.tokens(byte // 2, byte // 2 + 1)
    # The other blocks are still readable.
    other = (block + 1) * BLOCK // 2 if (block + 1) * BLOCK < path.stat().st_size else 0
    assert len(tokens.tokens(other, other + 5)) == 5


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_document_table_is_refused_on_opening(store: Path, seed: int) -> None:
    path, draw = _shard(store, "documents"), np.random.default_rng(seed)
    _flip(path, int(draw.integers(path.stat().st_size)), 1 << int(draw.integers(8)))
    with pytest.raises(DamagedStore, match=r"00000\.documents: damaged, .*; copy the store again or tokenize again"):
        TokenStore(store)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (lambda stops: stops[::-1], "do not ascend"),
        (lambda stops: stops * 0, "do not ascend"),
        (lambda stops: stops + 5, "end at token"),
        (lambda stops: -stops, "do not ascend"),
    ],
)
def test_an_inconsistent_document_table_is_refused_even_with_a_valid_checksum(store: Path, stops, message: str) -> None:
    path = _shard(store, "documents")
    table = np.fromfile(path, DOCUMENT)
    table["stop"] = stops(table["stop"])
    table.tofile(path)
    _edit(store, documents_sha256=_sha256(path))
    with pytest.raises(DamagedStore, match=message):
        TokenStore(store)


def test_a_store_without_block_sums_is_readable_and_refuses_ids_beyond_its_vocabulary(store: Path) -> None:
    whole = TokenStore(store)
    expected, fingerprint = whole.tokens(0, whole.num_tokens), whole.fingerprint
    _remove_block_sums(store)
    earlier = TokenStore(store)
    assert earlier.fingerprint == fingerprint
    assert not earlier.has_block_sums
    assert np.array_equal(earlier.tokens(0, earlier.num_tokens), expected)
    path = _shard(store, "tokens")
    _flip(path, 2 * 700 + 1, 0x80)
    with pytest.raises(DamagedStore, match=r"token 700 has the id \d+, but the store's vocabulary has 1000 ids"):
        TokenStore(store).tokens(690, 710)


def test_a_token_file_truncated_while_open_is_reported_in_one_line(store: Path) -> None:
    rows = ConcatRows(TokenStore(store), seq_len=64)
    assert len(rows[len(rows) - 1].tokens) == 64
    os.truncate(_shard(store, "tokens"), 100)
    with pytest.raises(DamagedStore, match=r"00000\.tokens: cut short, it has 100 bytes"):
        rows[len(rows) - 1]


def test_a_document_table_truncated_while_open_is_reported_in_one_line(store: Path) -> None:
    tokens = TokenStore(store)
    assert tokens.segments(0, 10).tolist() == [0] * 10
    os.truncate(_shard(store, "documents"), 100)
    with pytest.raises(DamagedStore, match=r"00000\.documents: cut short"):
        tokens.segments(0, 10)


def test_damaged_block_sums_are_named(store: Path) -> None:
    _flip(_shard(store, "blocks"), 2)
    with pytest.raises(DamagedStore, match=r"00000\.blocks: damaged"):
        TokenStore(store).tokens(0, 1)
    _shard(store, "blocks").unlink()
    with pytest.raises(DamagedStore, match=r"00000\.blocks: is missing"):
        TokenStore(store)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/b", "", "a\x1bb"])
def test_a_manifest_may_only_name_files_of_its_own_folder(store: Path, name: str) -> None:
    _edit(store, name=name)
    with pytest.raises(ValueError, match=r"^data\.path=.*which is no file of its folder"):
        TokenStore(store)


def test_outside_links_pipes_and_devices_are_not_read(store: Path, tmp_path: Path) -> None:
    path = _shard(store, "tokens")
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedStore, match=r"00000\.tokens: leads out of"):
        TokenStore(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedStore, match="not a regular file"):
        TokenStore(store)
    (store / MANIFEST).unlink()
    os.mkfifo(store / MANIFEST)
    with pytest.raises(ValueError, match="not a regular file"):
        TokenStore(store)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_tokens": "12"},
        {"num_tokens": -1},
        {"num_tokens": 2**80},
        {"num_documents": None},
        {"num_documents": 1.5},
        {"tokens_sha256": 3},
        {"name": ["x"]},
    ],
)
def test_a_manifest_field_of_the_wrong_type_is_named(store: Path, fields: dict[str, object]) -> None:
    _edit(store, **fields)
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged .*{next(iter(fields))}"):
        TokenStore(store)


def test_the_error_survives_pickling(store: Path) -> None:
    error = pickle.loads(pickle.dumps(DamagedStore("x: damaged")))
    assert (type(error), str(error)) == (DamagedStore, "x: damaged")


def test_a_span_reads_the_same_from_every_offset_of_a_block(store: Path) -> None:
    tokens = TokenStore(store)
    expected = np.array([token for document in DOCUMENTS for token in [*document, 0]])
    edge = BLOCK // 2
    for start in (0, 1, edge - 1, edge, edge + 1, 2 * edge - 3):
        for length in (0, 1, 2, 7, edge, edge + 1):
            stop = min(start + length, tokens.num_tokens)
            assert tokens.tokens(start, stop).tolist() == expected[start:stop].tolist()


def test_a_rank_with_intact_rows_refuses_the_step_together_with_the_rank_that_failed(monkeypatch) -> None:
    other = DamagedStore("store/train/00000.tokens: damaged")
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda sums: sums + torch.tensor([0, 1]))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, other])
    ones = torch.ones(1, 8, dtype=torch.long)
    batch = MicroBatch(ones, ones, None, torch.tensor([0]))
    with pytest.raises(DamagedStore, match=r"00000\.tokens: damaged"):
        step_batches.loss_weights([batch], step=3)
