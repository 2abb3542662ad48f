"""Micro-batches of one optimizer step: read on every rank or refused on every rank, and weighted by scored tokens."""

from collections.abc import Iterator, Sequence

import torch

from clex_train.data.batch import MicroBatch
from clex_train.token_store.shard_files import DamagedStore
from clex_train.utils import distributed
from clex_train.utils.errors import RunStopped


def read_step(micro_batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], DamagedStore | None]:
    """Read this rank's micro-batches of a step; none, and the damage, if their store cannot be read.

    The error is returned and not raised, so that `loss_weights` can raise it on all ranks together.
    """
    try:
        return list(micro_batches), None
    except DamagedStore as damage:
        return [], damage


def loss_weights(micro_batches: Sequence[MicroBatch], step: int, damage: DamagedStore | None = None) -> list[float]:
    """Return the weight of each of this rank's mean losses in the mean over all tokens of the step; collective.

    The weight is the micro-batch's scored tokens over the mean of all micro-batches and ranks. Losses and DeepSpeed's
    mean of the gradients are then means over the tokens of the step, however they are spread. All weights are 1 when
    micro-batches have equally many scored tokens.

    Raises:
        RunStopped: the step has no token to score.
        DamagedStore: on every rank, when `damage` is given on one.
    """
    scored = torch.tensor([batch.num_scored for batch in micro_batches], dtype=torch.int64)
    sums = torch.stack((scored.sum(), torch.tensor(int(damage is not None))))
    total, num_damaged = distributed.all_reduce_sum(sums).tolist()
    if num_damaged:
        raise DamagedStore(next(str(found) for found in distributed.gather_objects(damage) if found is not None))
    if total == 0:
        rows = [int(index) for batch in micro_batches for index in batch.row_indices]
        raise RunStopped(
            f"step {step}: no token can be scored (here of rows {min(rows)} to {max(rows)}): they hold documents of "
            "one token, padding, or turns of a conversation that the loss does not count; raise optim.batch_rows or "
            "data.seq_len, prepare conversations with max_tokens=data.seq_len, or set data.document_mask=false"
        )
    share = len(micro_batches) * distributed.world_size()
    return [int(count) * share / total for count in scored]
