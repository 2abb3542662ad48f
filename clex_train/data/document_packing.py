"""Pack pieces of documents into rows by an in-memory index: `best_fit` and `long_documents`.

best_fit is best-fit-decreasing bin packing (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024).
Documents longer than a row are cut into full rows. Remainders and shorter documents are placed whole, longest first,
each into the fullest row with enough room. Only documents longer than a row are ever cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from clex_train.data.rows import PADDING, Row
from clex_train.data.summary import PackingSummary
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError


class PieceRows:
    """Rows from pieces: row k joins pieces [row_offsets[k], row_offsets[k+1]), and EOS in `PADDING` fills the tail.

    Args:
        store: the store that holds the tokens.
        seq_len: tokens of a row, S.
        starts, lengths: int64 [P]: first token of each piece in the store, and its number of tokens.
        row_offsets: int64 [R+1].
        num_cut: documents that are cut into several pieces, or whose end is not read.
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
        """Return the rows of one pass."""
        return len(self.row_offsets) - 1

    def __getitem__(self, index: int) -> Row:
        """Return row `index`; each of its pieces is a segment."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = np.full(self.seq_len, self.store.eos_id, np.int64)
        segments = np.full(self.seq_len, PADDING, np.int32)
        scored = np.zeros(self.seq_len, np.bool_) if self.store.manifest.is_masked else None
        position = 0
        first, last = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        for segment, piece in enumerate(range(first, last)):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            tokens[position : position + length] = self.store.tokens(start, start + length)
            segments[position : position + length] = segment
            if scored is not None:
                scored[position : position + length] = self.store.scored(start, start + length)
            position += length
        return Row(tokens, segments, index, scored)

    def summary(self) -> PackingSummary:
        """Summarize exactly, from the index."""
        used = int(self.lengths.sum()) / (len(self) * self.seq_len)
        return PackingSummary(len(self), used, self.num_cut, len(self.starts) / len(self))


def long_documents(store: TokenStore, seq_len: int, min_tokens: int) -> PieceRows:
    """Cut full rows from each document of at least `min_tokens` >= `seq_len` tokens, EOS included.

    Raises:
        ConfigError: no document is that long; names the longest.
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
            f"{store.path} is that long (the longest has {int(lengths.max(initial=0))} tokens); lower it, or set a "
            "shorter data.seq_len",
        )
    # The end of a document that does not fill a row is dropped: every row lies within one document.
    starts = _full_spans(offsets[chosen], lengths[chosen], seq_len)
    num_cut = int((lengths[chosen] != seq_len).sum())
    return PieceRows(store, seq_len, starts, np.full(len(starts), seq_len), np.arange(len(starts) + 1), num_cut)


def best_fit(store: TokenStore, seq_len: int) -> PieceRows:
    """Pack every token of the store once into nearly the fewest rows; takes a few seconds for 10^9 tokens.

    Raises:
        ConfigError: the split has no documents.
    """
    offsets = store.doc_offsets
    lengths = np.diff(offsets)
    if not len(lengths):
        raise ConfigError("data.path", store.path, f"the store has no {store.split_name} documents")
    full = _full_spans(offsets[:-1], lengths, seq_len)
    rests = lengths % seq_len
    documents = np.flatnonzero(rests)
    # Longest first, equal lengths in store order (stable sort): the index is a function of the store alone.
    documents = documents[np.argsort(-rests[documents], kind="stable")]
    rows = pack_descending(rests[documents], seq_len)
    # Group pieces by row; stable, so that within a row the longest piece stays first.
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
    """Assign each item to a bin by best fit; return int64 [n], bins numbered from 0.

    Args:
        lengths: int64 [n], descending values in [1, capacity].
        capacity: size of a bin.
    """
    bins = np.empty(len(lengths), np.int64)
    rooms = _Rooms(capacity)
    # Place items of one length together: runs of bins with equal room make the work grow with the number of distinct
    # lengths (at most seq_len), not with n, which reaches 10^7.
    values, counts = np.unique(-lengths, return_counts=True)
    item = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        end = item + count
        while item < end:
            item += rooms.place(bins[item:end], length)
    return bins


class _Rooms:
    """Bins by remaining room, as runs of consecutive bins; the run opened last comes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._num_bins = 0
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self._sizes: list[int] = []
        """Ascending distinct rooms of the open bins."""

    def place(self, bins: np.ndarray, length: int) -> int:
        """Place at least one of the equal items, write their bins to the start of `bins` and return how many."""
        room, first, stop = self._take(length, len(bins))
        # Best fit fills one bin until the length no longer fits, then continues with the next bin of the run.
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
        """Take a run of the fullest bins with room for `length`, or open new ones; returns (room, first, stop)."""
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
        # Full bins are forgotten: no later item fits.
        if not room or first == stop:
            return
        if room not in self._runs:
            self._runs[room] = []
            insort(self._sizes, room)
        self._runs[room].append((first, stop))


def _full_spans(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return int64 starts of consecutive spans of `seq_len` tokens in each document, from its first token on."""
    # Vectorized: a loop over 10^7 documents takes minutes.
    counts = lengths // seq_len
    before = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum())) - np.repeat(before, counts)
    spans: np.ndarray = np.repeat(starts, counts) + within * seq_len
    return spans
