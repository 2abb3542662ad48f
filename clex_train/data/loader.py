"""From rows to micro-batches: which rank reads which rows of an optimizer step, and in what order.

Step s covers the global rows [s * batch_rows, (s + 1) * batch_rows). Reading the ranks of micro-batch 0, then those of
micro-batch 1, ... gives these rows in ascending order for any world size, so the run is the same however it is spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from clex_train.data.batch import Collate, MicroBatch, collate_rows
from clex_train.data.rows import Rows
from clex_train.utils.errors import ConfigError


def batches(
    rows: Rows,
    first_row: int,
    batch_rows: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    collate: Collate = collate_rows,
) -> Iterator[Iterator[MicroBatch]]:
    """Yield, for each optimizer step without end, an iterator over this rank's micro-batches of the step.

    Args:
        rows: the rows of the run.
        first_row: rows consumed before, a multiple of `batch_rows`; a resumed run passes steps_done * batch_rows.
        batch_rows: rows per optimizer step over all ranks.
        rank, world_size: this rank among those that share the rows.
        micro_batch: rows per rank in one forward.
        collate: makes a micro-batch of its rows: `collate_rows`, `collate_documents`, or a shard of either.

    Returns:
        Iterators of `batch_rows / (world_size * micro_batch)` micro-batches. A thread reads one step ahead.

    Raises:
        ConfigError: `batch_rows` is not a multiple of `world_size * micro_batch`; raised here, not at the first step.
            The iterator of a step raises what reading its rows does, such as `DamagedStore`.
    """
    if batch_rows % (world_size * micro_batch):
        raise ConfigError(
            "optim.batch_rows",
            batch_rows,
            "must be a multiple of ranks * engine.micro_batch = "
            f"{world_size} * {micro_batch} = {world_size * micro_batch}",
        )
    assert 0 <= rank < world_size, (rank, world_size)
    assert first_row >= 0, first_row
    return _read_ahead(rows, first_row, batch_rows, rank, world_size, micro_batch, collate)


def micro_batches(
    rows: Rows,
    first_row: int,
    batch_rows: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    collate: Collate = collate_rows,
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of the one step that begins at global row `first_row`; arguments as `batches`."""
    for start in range(first_row, first_row + batch_rows, world_size * micro_batch):
        first = start + rank * micro_batch
        yield collate([rows[index] for index in range(first, first + micro_batch)])


def _read_ahead(
    rows: Rows,
    first_row: int,
    batch_rows: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    collate: Collate,
) -> Iterator[Iterator[MicroBatch]]:
    def read(step_start: int) -> list[MicroBatch]:
        return list(micro_batches(rows, step_start, batch_rows, rank, world_size, micro_batch, collate))

    with ThreadPoolExecutor(1, thread_name_prefix="rows") as reader:
        following = reader.submit(read, first_row)
        while True:
            step = following
            wait([step])
            first_row += batch_rows
            following = reader.submit(read, first_row)
            yield _micro_batches_of(step)


def _micro_batches_of(step: Future[list[MicroBatch]]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a step that was read ahead; an error of reading them belongs to this step."""
    yield from step.result()
