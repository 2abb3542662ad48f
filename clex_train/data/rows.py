"""Interface of training data: rows of `seq_len` tokens that record the document of each token.

A packing (`concat_packing.py`, `document_packing.py`) holds the rows of one pass over a store. Orders and mixtures
(`sampler.py`, `mixture.py`) wrap rows and are rows themselves, so the loader knows a single interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

PADDING = -1
"""Segment of tokens without a document: the unused tail of a row, filled with EOS."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of S = `seq_len` tokens; the caller owns the arrays and may modify them."""

    tokens: np.ndarray
    """int64 [S]."""
    segments: np.ndarray
    """int32 [S]: document of each token within the row, ascending from 0; `PADDING` at the end."""
    index: int
    """Index of the row in its order; in a run one of `MicroBatch.row_indices`, from which positions are sampled."""
    scored: np.ndarray | None = None
    """bool [S]: tokens that the loss counts, such as those of an assistant; None: all but padding."""


class Rows(Protocol):
    """Rows by index; equal indices give equal rows, in any order and on any machine."""

    @property
    def seq_len(self) -> int:
        """Tokens of each row."""
        ...

    def __len__(self) -> int:
        """Return the rows of one pass over the data."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Return row `index` >= 0; raise `IndexError` if it does not exist."""
        ...
