"""The loader: the global order of rows is independent of world size, micro batch and starting point."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from clex_train.data.batch import MicroBatch
from clex_train.data.concat_packing import ConcatRows
from clex_train.data.loader import batches
from clex_train.data.rows import Rows
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store.shard_files import DamagedStore
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store

TENSORS = ("token_ids", "targets", "row_indices")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path = tmp_path_factory.mktemp("loader") / "store"
    write_store(path, {"train": [list(range(3, 3 + n)) for n in range(5, 80)]}, vocab_size=100)
    return ShuffledRows(ConcatRows(TokenStore(path), seq_len=16), seed=5)


def steps(rows: Rows, count: int, world_size: int, micro_batch: int, first_row: int = 0) -> list[list[MicroBatch]]:
    """Return for each step the micro batches of all ranks: micro batch 0 by rank, then micro batch 1, ..."""
    streams = [
        [list(step) for step in islice(batches(rows, first_row, 24, rank, world_size, micro_batch), count)]
        for rank in range(world_size)
    ]
    return [
        [stream[step][m] for m in range(24 // (world_size * micro_batch)) for stream in streams]
        for step in range(count)
    ]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 24), (2, 4), (3, 2), (4, 6), (24, 1)])
def test_the_global_order_does_not_depend_on_ranks_or_micro_batch(
    rows: Rows, world_size: int, micro_batch: int
) -> None:
    for step, parts in enumerate(steps(rows, 4, world_size, micro_batch)):
        index = torch.cat([part.row_indices for part in parts])
        assert index.tolist() == list(range(24 * step, 24 * step + 24))
        tokens = torch.cat([part.token_ids for part in parts])
        assert all(tokens[i].tolist() == rows[int(index[i])].tokens.tolist() for i in range(24))


def test_a_resumed_run_reads_the_same_rows(rows: Rows) -> None:
    whole = steps(rows, 6, 2, 3)
    resumed = steps(rows, 3, 2, 3, first_row=3 * 24)
    for before, after in zip(whole[3:], resumed, strict=True):
        for expected, got in zip(before, after, strict=True):
            for name in TENSORS:
                assert torch.equal(getattr(expected, name), getattr(got, name)), name


def test_batches_are_int64_with_separate_targets(rows: Rows) -> None:
    batch = next(next(batches(rows, 0, 8, 0, 1, 4)))
    shapes = {name: (getattr(batch, name).dtype, tuple(getattr(batch, name).shape)) for name in TENSORS}
    assert shapes == {
        "token_ids": (torch.int64, (4, 16)),
        "targets": (torch.int64, (4, 16)),
        "row_indices": (torch.int64, (4,)),
    }
    assert batch.document_positions is None
    batch.targets[:] = -100
    assert (batch.token_ids >= 0).all()


def test_reading_past_an_epoch_continues_with_the_next(rows: Rows) -> None:
    stream = batches(rows, 0, len(rows), 0, 1, len(rows))
    first, second = (next(next(stream)).token_ids for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_a_step_left_unread_does_not_shift_the_next(rows: Rows) -> None:
    stream = batches(rows, 0, 8, 0, 1, 4)
    next(stream)
    next(next(stream))
    assert next(next(stream)).row_indices.tolist() == [16, 17, 18, 19]


def test_an_indivisible_batch_is_refused_at_once(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"optim.batch_rows=10: must be a multiple of .* 2 \* 4 = 8"):
        batches(rows, 0, 10, 0, 2, 4)


def test_an_error_while_prefetching_reaches_the_caller(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"train": [[3] * 100]}, vocab_size=10)
    rows = ConcatRows(TokenStore(tmp_path / "store"), seq_len=10)
    (tmp_path / "store" / "train" / "00000.tokens").unlink()
    step = next(batches(rows, 0, 2, 0, 1, 1))
    with pytest.raises(DamagedStore, match=r"00000\.tokens: is missing"):
        next(step)
