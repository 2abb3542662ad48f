"""Packing whole documents by best-fit decreasing, and rows inside long documents."""

from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.concat_packing import ConcatRows
from clex_train.data.document_packing import best_fit, long_documents, pack_descending
from clex_train.data.rows import PADDING, Rows
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store

EOS = 1
LENGTHS = [1, 30, 4, 9, 15, 16, 47, 2, 2, 3, 7, 7, 7, 12, 31, 8, 5, 1, 1, 22]
"""Tokens of each document without its EOS; no two documents share a token."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return stored(tmp_path_factory.mktemp("pieces") / "store", LENGTHS)


def stored(path: Path, lengths: list[int]) -> TokenStore:
    documents = [[10 + d] * n for d, n in enumerate(lengths)]
    write_store(path, {"train": documents}, vocab_size=10 + len(lengths), eos_id=EOS)
    return TokenStore(path)


def pieces_of(rows: Rows) -> list[list[int]]:
    """Return the tokens of every segment of every row, sorted."""
    return sorted(
        row.tokens[row.segments == s].tolist()
        for row in (rows[k] for k in range(len(rows)))
        for s in range(int(row.segments.max()) + 1)
    )


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Return the room left in each bin after a plain loop in which every item considers every bin."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [b for b, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
        chosen = min(fitting, key=lambda b: rooms[b]) if fitting else len(rooms) - 1
        rooms[chosen] -= length
    return rooms


@settings(max_examples=200)
@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=80))
def test_grouped_best_fit_fills_bins_like_the_plain_loop(capacity: int, lengths: list[int]) -> None:
    items = sorted((min(n, capacity) for n in lengths), reverse=True)
    bins = pack_descending(np.array(items, np.int64), capacity)
    expected = slow_best_fit(items, capacity)
    rooms = np.full(len(expected), capacity)
    np.subtract.at(rooms, bins, items)
    assert sorted(rooms.tolist()) == sorted(expected)


@pytest.mark.parametrize("seq_len", [4, 8, 16, 64])
def test_best_fit_keeps_every_token_and_cuts_only_documents_longer_than_a_row(store: TokenStore, seq_len: int) -> None:
    expected = []
    for d, n in enumerate(LENGTHS):
        document = [10 + d] * n + [EOS]
        expected += [document[i : i + seq_len] for i in range(0, len(document), seq_len)]
    rows = best_fit(store, seq_len)
    assert pieces_of(rows) == sorted(expected)
    assert rows.summary().num_cut == sum(n + 1 > seq_len for n in LENGTHS)


def test_padding_is_eos_outside_any_segment_at_the_end_of_a_row(store: TokenStore) -> None:
    rows = best_fit(store, 16)
    padded = 0
    for k in range(len(rows)):
        row = rows[k]
        assert (row.tokens.shape, row.tokens.dtype, row.segments.dtype) == ((16,), np.int64, np.int32)
        runs = [segment for segment, _ in groupby(row.segments.tolist())]
        documents = len(runs) - (runs[-1] == PADDING)
        assert runs == [*range(documents), PADDING][: len(runs)]
        assert (row.tokens[row.segments == PADDING] == EOS).all()
        padded += int((row.segments == PADDING).sum())
    assert rows.summary().utilisation == pytest.approx(1 - padded / (16 * len(rows)))
    assert 16 * len(rows) - padded == store.num_tokens


def test_best_fit_cuts_fewer_documents_than_joining_them(store: TokenStore) -> None:
    assert best_fit(store, 16).summary().num_cut < ConcatRows(store, 16).summary().num_cut


def test_the_summary_of_joined_documents_matches_a_plain_loop(store: TokenStore) -> None:
    for seq_len in (3, 16, 20):
        rows, offsets = ConcatRows(store, seq_len), store.doc_offsets.tolist()
        covered = len(rows) * seq_len
        spans = [(a, b) for a, b in pairwise(offsets) if a < covered]
        cut = sum(a // seq_len != (b - 1) // seq_len for a, b in spans)
        pieces = sum((min(b, covered) - 1) // seq_len - a // seq_len + 1 for a, b in spans)
        summary = rows.summary()
        assert (summary.num_cut, summary.num_sampled) == (cut, None)
        assert summary.documents_per_row == pytest.approx(pieces / len(rows))


def test_the_summary_of_a_large_store_is_sampled_close_and_marked_as_such(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = stored(tmp_path / "store", rng.integers(1, 60, 4000).tolist())
    rows, offsets = ConcatRows(store, 32), store.doc_offsets
    cut = int((offsets[:-1] // 32 != (offsets[1:] - 1) // 32).sum())
    summary = rows.summary()
    assert summary.num_sampled is not None
    assert "about" in str(summary)
    assert summary.num_cut == pytest.approx(cut, rel=0.1)


@pytest.mark.parametrize(("seq_len", "shortest"), [(4, 4), (4, 10), (16, 16), (16, 31)])
def test_rows_of_long_documents_are_consecutive_and_within_one_document(
    store: TokenStore, seq_len: int, shortest: int
) -> None:
    expected = []
    for d, n in enumerate(LENGTHS):
        document = [10 + d] * n + [EOS]
        if len(document) >= shortest:
            expected += [document[i : i + seq_len] for i in range(0, len(document) - seq_len + 1, seq_len)]
    rows = long_documents(store, seq_len, shortest)
    assert [rows[k].tokens.tolist() for k in range(len(rows))] == expected
    assert not any(rows[k].segments.any() for k in range(len(rows)))
    assert rows.summary().utilisation == 1


def test_documents_that_are_all_too_short_are_refused_with_the_longest_length(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"data.min_document_tokens=49: none of the 20 .* longest has 48 tokens"):
        long_documents(store, 16, 49)


def test_the_index_depends_only_on_the_store(store: TokenStore) -> None:
    first, second = (best_fit(TokenStore(store.path), 16) for _ in range(2))
    assert all((first[k].tokens == second[k].tokens).all() for k in range(len(first)))
