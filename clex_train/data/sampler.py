"""Row order of a run: each epoch is a permutation of its own, and epochs follow each other without end.

Row i is a pure function of (rows, seed, i): epoch = i // len, then a computed permutation for that epoch. The only
state of the data order is one integer, the number of rows consumed: optimizer steps times rows per step. A checkpoint
records it, and `training.loop` starts reading there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from clex_train.data.permutation import Permutation
from clex_train.data.rows import Row, Rows
from clex_train.utils.errors import ConfigError
from clex_train.utils.seeding import generator


class ShuffledRows:
    """Shuffled, endless order over the rows of a packing; `stream` separates several orders of one seed."""

    def __init__(self, rows: Rows, seed: int, stream: str = "rows") -> None:
        self.rows = rows
        self.seq_len = rows.seq_len
        self._seed, self._stream = seed, stream
        # Two epochs: prefetching crosses into the next one while the current one is still read.
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def __len__(self) -> int:
        """Return the rows of one epoch."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Return row `index` >= 0 of the run; indices beyond `len` continue with the next epochs."""
        return replace(self.rows[self.position(index)], index=index)

    def position(self, index: int) -> int:
        """Return the packing's row number at `index` of the order."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        # Epochs never mix: every row is read once before any is read again.
        epoch, position = divmod(index, len(self))
        return self._permutation(epoch)(position)

    def _make_permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self), generator(self._seed, self._stream, epoch))


class SkippedRows:
    """Order without the skipped rows: row i is the i-th row that is kept, and keeps its original `index`.

    Args:
        rows: the order of the run.
        ranges: disjoint ascending half-open ranges of indices into `rows`, from `config.data.parse_ranges`.

    Raises:
        ConfigError: the ranges skip at least one whole pass over the data.
    """

    def __init__(self, rows: Rows, ranges: Sequence[tuple[int, int]]) -> None:
        lengths = [stop - start for start, stop in ranges]
        if ranges and sum(lengths) >= len(rows):
            raise ConfigError(
                "data.skip_rows",
                f"{[f'{start}-{stop - 1}' for start, stop in ranges]}",
                f"skips {sum(lengths)} rows, but one "
                f"pass over the data has {len(rows)}; list only the bad rows, or use another store",
            )
        self.rows = rows
        self.seq_len = rows.seq_len
        self._kept, self._skipped = _steps(ranges)

    def __len__(self) -> int:
        """Return the rows of one pass, skipped rows included."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Return the `index`-th kept row, `index` >= 0."""
        return self.rows[self.original(index)]

    def original(self, index: int) -> int:
        """Return the index among all rows of the `index`-th kept row."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        return index + self._skipped[bisect_right(self._kept, index)]


def original_index(ranges: Sequence[Sequence[int]], index: int) -> int:
    """Return the `index`-th nonnegative integer outside the disjoint ascending ranges."""
    kept, skipped = _steps(ranges)
    return index + skipped[bisect_right(kept, index)]


def _steps(ranges: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the integers kept before each range and the integers skipped so far, the latter one longer."""
    # With both, a lookup is one bisection instead of a walk over all earlier rows.
    skipped = [0, *accumulate(stop - start for start, stop in ranges)]
    return [start - before for (start, _), before in zip(ranges, skipped, strict=False)], skipped
