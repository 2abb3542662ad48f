"""One rank's part of rows that several ranks share: consecutive tokens, as many for each, the last part padded.

    row of S tokens, N ranks    rank r has tokens [r * n, (r + 1) * n), n = ceil(S / N); beyond S there is padding

Every rank of a group reads the same whole rows, which are a function of their index, and cuts out its part: nothing is
exchanged for it, and a run goes on with another N from the same rows. Labels are shifted over the whole row first, so
that the last token of a part predicts the first one of the next. Shapes: `B` rows, `S` tokens of a row, `n` of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clex_train.data import batch as whole
from clex_train.data.batch import UNSCORED, Batch, Collate
from clex_train.data.rows import Row


def sharded(collate: Collate, index: int, count: int) -> Collate:
    """`collate` for part `index` of `count` of each row; `collate` itself where rows are not shared."""

    def collate_part(rows: Sequence[Row]) -> Batch:
        return part_of(collate(rows), index, count)

    return collate_part if count > 1 else collate


def part_of(batch: Batch, index: int, count: int) -> Batch:
    """Part `index` of `count` of a micro-batch of whole rows.

    `input_ids` and `shift_labels` int64 [B, n], the latter what each token has to predict; `position_ids` [B, S] of the
    whole rows where documents are kept apart, and `row_index` [B].
    """
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=UNSCORED)
    part: Batch = {name: batch[name] for name in ("row_index", "position_ids") if name in batch}
    shift_labels = cut(labels, index, count, UNSCORED)
    return {**part, "input_ids": cut(batch["input_ids"], index, count), "shift_labels": shift_labels}


def cut(tensor: Tensor, index: int, count: int, fill: float = 0) -> Tensor:
    """Part `index` of `count` of [B, S], padded with `fill`: [B, n], contiguous."""
    start, length = index * part_len(tensor.shape[1], count), part_len(tensor.shape[1], count)
    part = tensor[:, start : start + length]
    return torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill).contiguous()


def part_len(row_len: int, count: int) -> int:
    """n: tokens of a part of a row."""
    return -(-row_len // count)


def positions_of_whole_rows(batch: Batch, row_len: int, count: int) -> Tensor:
    """`position_ids` of rows with their padding, int64 [B, N * n]: those of documents, else 0, 1, 2, ...

    Where documents are kept apart, padding is one more of them.
    """
    padded = count * part_len(row_len, count)
    num_rows = len(batch["row_index"])
    if "position_ids" not in batch:
        return torch.arange(padded).expand(num_rows, -1)
    return torch.cat((batch["position_ids"], torch.arange(padded - row_len).expand(num_rows, -1)), dim=1)


def num_scored(batch: Batch) -> int:
    """How many tokens the loss of a micro-batch, of whole rows or of parts, is a mean over."""
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != UNSCORED).sum())
    return whole.num_scored(batch["labels"])
