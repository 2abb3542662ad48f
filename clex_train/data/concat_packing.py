"""Pack by concatenation (`data.packing=concat`): documents joined by EOS and cut every `seq_len` tokens.

There is no index: row k is the span [k * seq_len, (k + 1) * seq_len) of the store's tokens.
"""

from __future__ import annotations

import numpy as np

from clex_train.data.rows import Row
from clex_train.data.summary import PackingSummary
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError

NUM_SAMPLED = 512
"""Rows that the summary of a larger store samples."""


class ConcatRows:
    """Rows of one pass over a store, in its order; the tokens after the last full row are dropped.

    Raises:
        ConfigError: the split has fewer than `seq_len` tokens.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        if seq_len < 1:
            raise ConfigError("data.seq_len", seq_len, "must be at least 1 token")
        if seq_len > store.num_tokens:
            raise ConfigError(
                "data.seq_len",
                seq_len,
                f"{store.path} has {store.num_tokens} {store.split_name} tokens, fewer than "
                f"one row; set data.seq_len<={store.num_tokens} or use a larger store",
            )
        self.store = store
        self.seq_len = seq_len

    def __len__(self) -> int:
        """Return the number of full rows."""
        return self.store.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> Row:
        """Return the `seq_len` tokens from token `index * seq_len` on."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.seq_len
        stop = start + self.seq_len
        # int64, which embedding lookups of torch need; the store keeps uint16 or uint32.
        tokens, segments = self.store.tokens(start, stop).astype(np.int64), self.store.segments(start, stop)
        return Row(tokens, segments, index, self.store.scored(start, stop))

    def summary(self) -> PackingSummary:
        """Summarize exactly up to `NUM_SAMPLED` rows, beyond that from evenly spaced samples."""
        # Each row needs two lookups in tables on disk, which a store of millions of rows cannot afford at startup.
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), NUM_SAMPLED)).astype(np.int64)).tolist()
        pieces, cut = np.array([self._pieces_and_cuts(k) for k in chosen]).mean(axis=0)
        sampled = len(chosen) if len(chosen) < len(self) else None
        return PackingSummary(len(self), 1.0, round(cut * len(self)), float(pieces), sampled)

    def _pieces_and_cuts(self, index: int) -> tuple[int, int]:
        """Return the documents of a row, and 1 if a document that begins in it continues in the next row."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        # One token more on each side shows if the first and last documents cross the borders of the row.
        around = self.store.segments(max(start - 1, 0), min(stop + 1, self.store.num_tokens))
        inside = around[start > 0 :][: self.seq_len]
        begins = inside[0] != inside[-1] or start == 0 or around[0] != inside[0]
        goes_on = stop < self.store.num_tokens and around[-1] == inside[-1]
        return int(inside[-1] - inside[0]) + 1, int(begins and goes_on)
