"""The order of a run: every pass over the rows in a permutation of its own, one pass after another without end.

Row i is a pure function of (rows, seed, i): epoch = i // len, and a permutation per epoch, computed and not stored.
So the only state of a run's data order is one integer, the rows consumed.
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


class SkippedRows:
    """Rows without some of them: row i is the i-th that is not skipped, and its `index` stays what it was.

    Args:
        rows: the order of the run.
        ranges: disjoint ascending half-open ranges of indices into `rows`, as `settings.data.parse_ranges` gives them.

    Raises:
        ValueError: as many rows are skipped as one pass over the data has.
    """

    def __init__(self, rows: Rows, ranges: Sequence[tuple[int, int]]) -> None:
        lengths = [stop - start for start, stop in ranges]
        if ranges and sum(lengths) >= len(rows):
            raise ConfigError(
                "data.skip_rows",
                f"{[f'{start}-{stop - 1}' for start, stop in ranges]}",
                f"{sum(lengths)} rows, and one "
                f"pass over the data has {len(rows)}; name the bad rows alone, or take another store",
            )
        self.rows = rows
        self.seq_len = rows.seq_len
        self._kept, self._skipped = _steps(ranges)

    def __len__(self) -> int:
        """Rows of one pass, with those that are skipped in it."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """The row at place `index` >= 0 among those that are not skipped."""
        return self.rows[self.original(index)]

    def original(self, index: int) -> int:
        """The index that the row at place `index` has among all rows."""
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        return index + self._skipped[bisect_right(self._kept, index)]


def original_index(ranges: Sequence[Sequence[int]], index: int) -> int:
    """The `index`-th of the integers from 0 on that lie in none of the disjoint ascending ranges."""
    kept, skipped = _steps(ranges)
    return index + skipped[bisect_right(kept, index)]


def _steps(ranges: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """How many integers are kept before each range, and how many are skipped by then: the latter one longer."""
    skipped = [0, *accumulate(stop - start for start, stop in ranges)]
    return [start - before for (start, _), before in zip(ranges, skipped, strict=False)], skipped
