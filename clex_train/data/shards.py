"""Sequence-parallel shards: consecutive tokens of each row, equally many on every rank, the last shard padded.

    row of S tokens, N ranks    rank r has tokens [r * n, (r + 1) * n), n = ceil(S / N); beyond S there is padding

Every rank of a group reads the same whole rows, which are a function of their index, and cuts out its shard. So no rank
sends tokens to another, and a run resumes with another N from the same rows. Shapes: `B` rows, `S` tokens of a row,
`n` tokens of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clex_train.data.batch import UNSCORED, Collate, MicroBatch
from clex_train.data.rows import Row


def shard_collate(collate: Collate, index: int, count: int) -> Collate:
    """Make `collate` return shard `index` of `count` of each row; `collate` itself for a single rank."""

    def collate_shard(rows: Sequence[Row]) -> MicroBatch:
        return shard_batch(collate(rows), index, count)

    return collate_shard if count > 1 else collate


def shard_batch(batch: MicroBatch, index: int, count: int) -> MicroBatch:
    """Cut shard `index` of `count` out of a micro-batch of whole rows."""
    return replace(
        batch,
        token_ids=shard(batch.token_ids, index, count),
        targets=shard(batch.targets, index, count, UNSCORED),
    )


def shard(tensor: Tensor, index: int, count: int, fill: float = 0) -> Tensor:
    """Cut shard `index` of `count` out of [B, S], padded with `fill`: [B, n], contiguous."""
    start, length = index * part_len(tensor.shape[1], count), part_len(tensor.shape[1], count)
    part = tensor[:, start : start + length]
    return torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill).contiguous()


def part_len(row_len: int, count: int) -> int:
    """Return n, the tokens of a shard of a row of `row_len` tokens."""
    return -(-row_len // count)


def padded_positions(batch: MicroBatch, row_len: int, count: int) -> Tensor:
    """Return the plain positions of whole rows with their padding, int64 [B, N * n].

    They restart at each document where documents are masked from each other, and at the padding then, as at one more
    document; else they are 0, 1, 2, ...
    """
    padded = count * part_len(row_len, count)
    num_rows = len(batch.row_indices)
    if batch.document_positions is None:
        return torch.arange(padded).expand(num_rows, -1)
    return torch.cat((batch.document_positions, torch.arange(padded - row_len).expand(num_rows, -1)), dim=1)
