"""The order of a run: every pass over the rows in a permutation of its own, one pass after another without end.

Row i is a pure function of (rows, seed, i): epoch = i // len, and a permutation per epoch, computed and not stored.
So the only state of a run's data order is one integer, the rows consumed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from clex_train.data.permutation import Permutation
from clex_train.data.rows import Row, Rows
from clex_train.seeding import generator


class ShuffledRows:
    """The rows of a packing in a shuffled, endless order; `stream` names it, so that two orders of a seed differ."""

    def __init__(self, rows: Rows, seed: int, stream: str = "rows") -> None:
        self.rows = rows
        self.seq_len = rows.seq_len
        self._seed, self._stream = seed, stream
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index` >= 0 of the run; beyond `len` the next epochs follow."""
        return replace(self.rows[self.position(index)], index=index)

    def position(self, index: int) -> int:
        """Which of the packing's rows stands at `index` of the order."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        epoch, position = divmod(index, len(self))
        return self._permutation(epoch)(position)

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(len(self), generator(self._seed, self._stream, epoch))
