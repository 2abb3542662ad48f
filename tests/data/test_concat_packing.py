"""Packing by concatenation: rows are slices of the token stream and record document boundaries."""

from itertools import groupby

import numpy as np
import pytest

from clex_train.data.concat_packing import ConcatRows
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store

DOCUMENTS = [[10 + d] * (3 * d % 11 + 1) for d in range(40)]
EOS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("rows") / "store"
    write_store(path, {"train": DOCUMENTS, "validation": [[7, 8, 9]]}, vocab_size=100, eos_id=EOS)
    return TokenStore(path)


def joined() -> list[int]:
    """Return the slow reference: one Python list of all documents, EOS after each."""
    return [token for document in DOCUMENTS for token in [*document, EOS]]


def owners() -> list[int]:
    """Return the document index of each token of `joined`."""
    return [d for d, document in enumerate(DOCUMENTS) for _ in [*document, EOS]]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64])
def test_a_pass_has_every_span_of_the_joined_documents_once(store: TokenStore, seq_len: int) -> None:
    tokens = joined()
    rows = ConcatRows(store, seq_len)
    assert len(rows) == len(tokens) // seq_len
    for k in range(len(rows)):
        assert rows[k].tokens.tolist() == tokens[seq_len * k : seq_len * (k + 1)]
        assert rows[k].index == k


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64])
def test_segments_count_the_documents_of_a_row_from_zero(store: TokenStore, seq_len: int) -> None:
    rows = ConcatRows(store, seq_len)
    for k in range(len(rows)):
        of_row = owners()[seq_len * k : seq_len * (k + 1)]
        expected = [n for n, (_, tokens) in enumerate(groupby(of_row)) for _ in tokens]
        assert rows[k].segments.tolist() == expected
        assert rows[k].segments.dtype == np.int32


def test_rows_are_int64_copies_that_may_be_written_to(store: TokenStore) -> None:
    rows = ConcatRows(store, 4)
    row = rows[0].tokens
    before = row.copy()
    row[:] = -100
    assert row.dtype == np.int64
    assert (rows[0].tokens == before).all()


def test_a_row_longer_than_the_store_is_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=rf"data.seq_len=100000: .* has {len(joined())} train tokens") as caught:
        ConcatRows(store, 100_000)
    assert "\n" not in str(caught.value)


def test_a_row_as_long_as_the_store_is_the_whole_store(store: TokenStore) -> None:
    assert ConcatRows(store, len(joined()))[0].tokens.tolist() == joined()


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_row_that_does_not_exist_is_refused(store: TokenStore, index: int) -> None:
    with pytest.raises(IndexError):
        ConcatRows(store, 4)[index]
