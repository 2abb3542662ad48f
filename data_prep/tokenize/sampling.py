"""Spot check: encode a sample of a shard's pieces with a second engine and compare the ids."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from data_prep.tokenize.engines import Engine

SPAN_CHARS = 1 << 14
"""Characters to compare at the beginning of a shard and at each sampled place."""
MEAN_GAP_CHARS = 64_000_000
"""Mean distance of sampled places: one character in 4,000 is compared, in about 2 % of gigatoken's time."""


MAX_CHARS = 1 << 20
"""Longest piece to compare: a larger uncuttable document would take minutes and gigabytes."""


class Mismatch(ValueError):
    """Two engines gave different ids; `index` is the number of the piece in its batch."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class SampleCheck:
    """Compares sampled pieces with a reference engine; the sample depends only on `seed` and the texts' lengths."""

    def __init__(self, reference: Engine, seed: str) -> None:
        self._reference = reference
        # Not the global generator: a shard must be checked at the same places in any process.
        self._random = random.Random(seed)
        self._position = self._next = 0

    def compare(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> None:
        """Raise `Mismatch` if the ids of a sampled piece differ from the reference."""
        drawn = [i for i, text in enumerate(texts) if self._draw(len(text))]
        for i, expected in zip(drawn, self._reference.encode([texts[i] for i in drawn]), strict=True):
            if not np.array_equal(ids[i], expected):
                raise Mismatch(i)

    def _draw(self, num_chars: int) -> bool:
        """Advance by a piece and return True if it is in the sample: up to `SPAN_CHARS` from each sampled place."""
        self._position += num_chars
        if self._position <= self._next or num_chars > MAX_CHARS:
            return False
        if self._position >= self._next + SPAN_CHARS:
            # Exponential gaps make the places a Poisson process: every character has the same chance.
            self._next = self._position + int(self._random.expovariate(1 / MEAN_GAP_CHARS))
        return True
