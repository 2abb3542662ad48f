"""The global row order: every row once an epoch, as a function of seed and index only."""

import time
import tracemalloc

import numpy as np
import pytest

from clex_train.data.rows import Row
from clex_train.data.sampler import ShuffledRows


class Numbers:
    """Rows that contain only their own index, so that any number of them needs no memory."""

    seq_len = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        assert 0 <= index < self.count
        return Row(np.array([index]), np.zeros(1, np.int32), index)


def read(rows: ShuffledRows, start: int, stop: int) -> list[int]:
    return [int(rows[i].tokens[0]) for i in range(start, stop)]


def test_each_epoch_visits_every_row_once_in_a_new_order() -> None:
    rows = ShuffledRows(Numbers(50), seed=3)
    epochs = [read(rows, 50 * epoch, 50 * epoch + 50) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_only_on_seed_stream_and_epoch() -> None:
    def order(seed: int, stream: str = "rows") -> list[int]:
        return read(ShuffledRows(Numbers(50), seed, stream), 0, 50)

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, "others")


def test_rows_can_be_read_in_any_order() -> None:
    forward = read(ShuffledRows(Numbers(50), seed=1), 0, 200)
    fresh = ShuffledRows(Numbers(50), seed=1)
    assert [int(fresh[i].tokens[0]) for i in reversed(range(200))] == forward[::-1]


def test_a_row_records_its_index_in_the_order() -> None:
    rows = ShuffledRows(Numbers(50), seed=1)
    assert [rows[i].index for i in (0, 49, 50, 10**6)] == [0, 49, 50, 10**6]


def test_a_negative_row_is_refused() -> None:
    with pytest.raises(IndexError):
        ShuffledRows(Numbers(5), seed=0)[-1]


def test_a_billion_rows_cost_no_more_than_a_thousand() -> None:
    tracemalloc.start()
    huge, start = ShuffledRows(Numbers(10**9), seed=0), time.process_time()
    got = read(huge, 7 * 10**9 - 500, 7 * 10**9 + 500)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(got[:500])) == len(set(got[500:])) == 500
    assert 0 <= min(got) <= max(got) < 10**9
    assert peak < 2**20, "bytes; a stored permutation of 10^9 rows would be gigabytes"
    assert seconds < 2
