"""What training reads: rows of `seq_len` tokens that know which document each token comes from.

A packing (`clex_train/data/packing.py`, ...) is the rows of one pass over a store, in the store's order. Orders and
mixtures (`clex_train/data/order.py`, ...) wrap rows and are rows themselves, so the loader knows one interface alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

PADDING = -1
"""Segment of tokens that belong to no document: the unused tail of a row, filled with EOS."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of S = `seq_len` tokens; the arrays are its own and may be written to."""

    tokens: np.ndarray
    """int64 [S]."""
    segments: np.ndarray
    """int32 [S]: which document of the row a token belongs to, counted from 0 and ascending; `PADDING` at the end."""
    index: int
    """Index in its order: in a run one of `MicroBatch.row_indices`, which sampled positions are a function of."""


class Rows(Protocol):
    """Rows by their index; equal indices give equal rows, in any order and on any machine."""

    @property
    def seq_len(self) -> int:
        """Tokens in each row."""
        ...

    def __len__(self) -> int:
        """Rows of one pass over the data."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Row `index` >= 0. `IndexError` for one that does not exist."""
        ...
