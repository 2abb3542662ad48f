"""The rows of one optimizer step: read on every rank or refused on every rank, and what each micro-batch counts."""

from collections.abc import Iterator, Sequence

import torch

from clex_train.data.batch import Batch
from clex_train.data.shard_files import DamagedStore
from clex_train.data.shards import num_scored
from clex_train.utils import distributed
from clex_train.utils.errors import RunStopped


def read_step(micro_batches: Iterator[Batch]) -> tuple[list[Batch], DamagedStore | None]:
    """This rank's micro-batches of a step, or none and what is wrong with the store they are read from."""
    try:
        return list(micro_batches), None
    except DamagedStore as damage:
        return [], damage


def loss_weights(micro_batches: Sequence[Batch], step: int, damage: DamagedStore | None = None) -> list[float]:
    """What the mean loss of each of this rank's micro-batches counts in the mean over all of the step; collective.

    Scored tokens of the micro-batch over the mean of all micro-batches and ranks, so that the weighted mean, which
    DeepSpeed takes of the gradients too, is the mean over the tokens of the step however it is spread. All 1 when
    rows have equally many. `RunStopped` when the step has no token to score; `DamagedStore` on every rank where one of
    them could not read its rows, with what `damage` is there.
    """
    scored = torch.tensor([num_scored(batch) for batch in micro_batches], dtype=torch.int64)
    sums = torch.stack((scored.sum(), torch.tensor(int(damage is not None))))
    total, num_damaged = distributed.all_reduce_sum(sums).tolist()
    if num_damaged:
        raise DamagedStore(next(str(found) for found in distributed.gather_objects(damage) if found is not None))
    if total == 0:
        rows = [int(index) for batch in micro_batches for index in batch["row_index"]]
        raise RunStopped(
            f"step {step}: no token can be scored (here of rows {min(rows)} to {max(rows)}): they hold documents "
            "of one token, or padding; raise optim.batch_rows or set data.document_mask=false"
        )
    share = len(micro_batches) * distributed.world_size()
    return [int(count) * share / total for count in scored]
