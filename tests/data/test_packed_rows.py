"""Rows are the store's tokens, each once an epoch, in an order that is a function of the seed."""

import numpy as np
import pytest

from clex_train.data.packing import PackedRows
from clex_train.data.store import TokenStore
from clex_train.data.writer import write_store

DOCUMENTS = [[10 + d] * (3 * d % 11 + 1) for d in range(40)]
EOS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("rows") / "store"
    write_store(path, {"train": DOCUMENTS, "validation": [[7, 8, 9]]}, vocab_size=100, eos_id=EOS)
    return TokenStore(path)


def joined() -> list[int]:
    """The slow reference: one Python list of all documents, EOS after each."""
    return [token for document in DOCUMENTS for token in [*document, EOS]]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64])
def test_an_epoch_holds_every_span_of_the_joined_documents_once(store: TokenStore, seq_len: int) -> None:
    tokens = joined()
    expected = [tokens[i : i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]
    rows = PackedRows(store, seq_len, seed=3)
    assert len(rows) == len(expected)
    for epoch in range(3):
        got = [rows[epoch * len(rows) + i].tolist() for i in range(len(rows))]
        assert sorted(got) == sorted(expected)


def test_row_i_is_the_span_it_says(store: TokenStore) -> None:
    rows, tokens = PackedRows(store, 5, seed=0), joined()
    for i in (0, 1, len(rows) - 1, len(rows), 10**6):
        assert rows[i].tolist() == tokens[5 * rows.span(i) : 5 * rows.span(i) + 5]


def test_rows_are_int64_copies_that_may_be_written_to(store: TokenStore) -> None:
    rows = PackedRows(store, 4, seed=0)
    row = rows[0]
    before = row.copy()
    row[:] = -100
    assert row.dtype == np.int64
    assert (rows[0] == before).all()


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(store: TokenStore) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        rows = PackedRows(TokenStore(store.path), 4, seed)
        return [rows.span(epoch * len(rows) + i) for i in range(len(rows))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_rows_may_be_asked_for_in_any_order(store: TokenStore) -> None:
    rows = PackedRows(store, 3, seed=1)
    forward = [rows[i].tolist() for i in range(200)]
    fresh = PackedRows(store, 3, seed=1)
    assert [fresh[i].tolist() for i in reversed(range(200))] == forward[::-1]


def test_a_row_longer_than_the_store_is_one_clear_error(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=rf"data.seq_len=100000: .* has {len(joined())} train tokens") as caught:
        PackedRows(store, 100_000, seed=0)
    assert "\n" not in str(caught.value)


def test_a_row_as_long_as_the_store_is_the_store(store: TokenStore) -> None:
    rows = PackedRows(store, len(joined()), seed=0)
    assert rows[12].tolist() == joined()


def test_a_negative_row_is_refused(store: TokenStore) -> None:
    with pytest.raises(IndexError):
        PackedRows(store, 4, seed=0)[-1]
