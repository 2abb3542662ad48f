"""Rows cut from a token store: documents joined by EOS, the join cut every `seq_len` tokens (`packing=concat`).

Row i is a pure function of (store, seq_len, seed, i): epoch = i // len, and a permutation per epoch, computed and not
stored, says which span of the store it is. So the only state of a run's data order is one integer, the rows consumed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from clex_train.data.permutation import Permutation
from clex_train.data.store import TokenStore
from clex_train.seeding import generator


class PackedRows:
    """Rows of `seq_len` tokens in a shuffled, endless order; the tokens after the last full row are not read.

    Raises:
        ValueError: the split holds fewer than `seq_len` tokens.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int) -> None:
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len}: at least 1 token")
        if seq_len > store.num_tokens:
            raise ValueError(
                f"data.seq_len={seq_len}: {store.path} has {store.num_tokens} {store.split_name} tokens, fewer than "
                f"one row; take data.seq_len<={store.num_tokens} or a larger store"
            )
        self.store = store
        self.seq_len = seq_len
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return self.store.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index` >= 0 of the run, int64 [seq_len], a copy; beyond `len` the next epochs follow."""
        start = self.span(index) * self.seq_len
        return self.store.tokens(start, start + self.seq_len).astype(np.int64)

    def span(self, index: int) -> int:
        """Which of the store's consecutive spans of `seq_len` tokens row `index` is."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        epoch, position = divmod(index, len(self))
        return self._permutation(epoch)(position)

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(len(self), generator(self.seed, "rows", epoch))
