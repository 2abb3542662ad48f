"""Rows put together from pieces of documents by an index in memory: `best_fit` and `long_documents`.

best_fit: best-fit-decreasing bin packing (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024). A
document longer than a row is cut into full rows; what remains of it, and every shorter document, goes whole into the
row with the least room that still takes it, the longest first. A document is cut only if it does not fit in any row.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from clex_train.data.rows import PADDING, Row
from clex_train.data.store import TokenStore
from clex_train.data.summary import PackingSummary
from clex_train.utils.errors import ConfigError


class PieceRows:
    """Row k joins the pieces [row_offsets[k], row_offsets[k+1]); its tail, if any, is EOS of no segment.

    Args:
        store: where the tokens lie.
        seq_len: tokens of a row, S.
        starts, lengths: int64 [P]: each piece's first token in the store and its tokens.
        row_offsets: int64 [R+1].
        num_cut: documents that were cut into several pieces, or whose end is not read.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        starts: np.ndarray,
        lengths: np.ndarray,
        row_offsets: np.ndarray,
        num_cut: int,
    ) -> None:
        self.store = store
        self.seq_len = seq_len
        self.starts, self.lengths, self.row_offsets = starts, lengths, row_offsets
        self.num_cut = num_cut

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self.row_offsets) - 1

    def __getitem__(self, index: int) -> Row:
        """The pieces of row `index`, each a segment."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = np.full(self.seq_len, self.store.eos_id, np.int64)
        segments = np.full(self.seq_len, PADDING, np.int32)
        position = 0
        first, last = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        for segment, piece in enumerate(range(first, last)):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            tokens[position : position + length] = self.store.tokens(start, start + length)
            segments[position : position + length] = segment
            position += length
        return Row(tokens, segments, index)

    def summary(self) -> PackingSummary:
        """Exact, from the index."""
        used = int(self.lengths.sum()) / (len(self) * self.seq_len)
        return PackingSummary(len(self), used, self.num_cut, len(self.starts) / len(self))


def long_documents(store: TokenStore, seq_len: int, min_tokens: int) -> PieceRows:
    """The full rows inside each document of at least `min_tokens` >= `seq_len` tokens, EOS included.

    Raises:
        ValueError: no document is that long; the longest is named.
    """
    assert min_tokens >= seq_len, (min_tokens, seq_len)
    offsets = store.doc_offsets
    lengths = np.diff(offsets)
    chosen = np.flatnonzero(lengths >= min_tokens)
    if not len(chosen):
        raise ConfigError(
            "data.min_document_tokens",
            min_tokens,
            f"none of the {len(lengths)} {store.split_name} documents of "
            f"{store.path} is that long (the longest has {int(lengths.max(initial=0))} tokens); take fewer, or a "
            "shorter data.seq_len",
        )
    starts = _full_spans(offsets[chosen], lengths[chosen], seq_len)
    num_cut = int((lengths[chosen] != seq_len).sum())
    return PieceRows(store, seq_len, starts, np.full(len(starts), seq_len), np.arange(len(starts) + 1), num_cut)


def best_fit(store: TokenStore, seq_len: int) -> PieceRows:
    """Every token of the store once, in the fewest rows that best-fit-decreasing finds; a few seconds for 10^9 tokens.

    Raises:
        ValueError: the split has no documents.
    """
    offsets = store.doc_offsets
    lengths = np.diff(offsets)
    if not len(lengths):
        raise ConfigError("data.path", store.path, f"the store has no {store.split_name} documents")
    full = _full_spans(offsets[:-1], lengths, seq_len)
    rests = lengths % seq_len
    documents = np.flatnonzero(rests)
    # The longest first; equal lengths in the store's order, so that the index is a function of the store alone.
    documents = documents[np.argsort(-rests[documents], kind="stable")]
    rows = pack_descending(rests[documents], seq_len)
    by_row = np.argsort(rows, kind="stable")
    chosen = documents[by_row]
    counts = np.concatenate([np.ones(len(full), np.int64), np.bincount(rows)])
    return PieceRows(
        store,
        seq_len,
        np.concatenate([full, offsets[chosen + 1] - rests[chosen]]),
        np.concatenate([np.full(len(full), seq_len, np.int64), rests[chosen]]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        num_cut=int((lengths > seq_len).sum()),
    )


def pack_descending(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item by best fit: int64 [n], bins counted from 0.

    Args:
        lengths: int64 [n] of descending values in [1, capacity].
        capacity: what a bin holds.

    Items of one length go together: the fullest bins that still take the length take as many as fit, then the next
    fullest, and bins of equal room are one run of bins. So the work grows with the distinct lengths, not with n.
    """
    bins = np.empty(len(lengths), np.int64)
    rooms = _Rooms(capacity)
    values, counts = np.unique(-lengths, return_counts=True)
    item = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        end = item + count
        while item < end:
            item += rooms.place(bins[item:end], length)
    return bins


class _Rooms:
    """Bins by the room that is left in them: runs of consecutive bins, the last opened first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._num_bins = 0
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self._sizes: list[int] = []
        """Ascending rooms that some bin has."""

    def place(self, bins: np.ndarray, length: int) -> int:
        """Write the bins of the first of the equal items left, of which there is one; returns how many were placed."""
        room, first, stop = self._take(length, len(bins))
        each = room // length
        full = min(stop - first, len(bins) // each)
        placed = full * each
        bins[:placed] = np.repeat(np.arange(first, first + full), each)
        self._put(room - each * length, first, first + full)
        first += full
        rest = min(len(bins) - placed, each) if first < stop else 0
        if rest:
            bins[placed : placed + rest] = first
            self._put(room - rest * length, first, first + 1)
            first += 1
        self._put(room, first, stop)
        return placed + rest

    def _take(self, length: int, count: int) -> tuple[int, int, int]:
        """A run of the bins with the least room for `length`, or new ones for `count` items: (room, first, stop)."""
        at = bisect_left(self._sizes, length)
        if at == len(self._sizes):
            needed = -(-count // (self.capacity // length))
            self._num_bins += needed
            return self.capacity, self._num_bins - needed, self._num_bins
        room = self._sizes[at]
        runs = self._runs[room]
        first, stop = runs.pop()
        if not runs:
            del self._runs[room], self._sizes[at]
        return room, first, stop

    def _put(self, room: int, first: int, stop: int) -> None:
        if not room or first == stop:
            return
        if room not in self._runs:
            self._runs[room] = []
            insort(self._sizes, room)
        self._runs[room].append((first, stop))


def _full_spans(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """int64: where each span of `seq_len` tokens begins that lies in a document, counted from its first token."""
    counts = lengths // seq_len
    before = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum())) - np.repeat(before, counts)
    spans: np.ndarray = np.repeat(starts, counts) + within * seq_len
    return spans
