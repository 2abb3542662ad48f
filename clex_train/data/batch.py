"""From rows to the tensors of a micro-batch: documents joined, or kept apart (`data.document_mask`).

Kept apart, positions restart at every document, which is how transformers is told where one ends, and the first token
of each is not scored: it could only be predicted from another document. Shapes: `B` rows, `S` tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clex_train.data.rows import PADDING, Row

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Row]], Batch]

UNSCORED = -100
"""The label that transformers leaves out of the loss."""


def joined(rows: Sequence[Row]) -> Batch:
    """`input_ids` and `labels` int64 [B, S] (models shift labels themselves) and `row_index` int64 [B].

    Every token sees all earlier ones of its row. Padding is not scored.
    """
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    labels = tokens.masked_fill(_segments(rows) == PADDING, UNSCORED)
    return {"input_ids": tokens, "labels": labels, "row_index": torch.tensor([row.index for row in rows])}


def separated(rows: Sequence[Row]) -> Batch:
    """As `joined`, and `segment_ids` and `position_ids` int64 [B, S]: positions in the document, counted from 0.

    A document that a row cuts starts anew in the next one. The first token of each is not scored. Padding is a
    segment of its own, `rows.PADDING`.
    """
    segments = _segments(rows)
    positions = positions_in(segments)
    batch = joined(rows)
    labels = batch["labels"].masked_fill(positions == 0, UNSCORED)
    return {**batch, "labels": labels, "segment_ids": segments, "position_ids": positions}


def positions_in(segments: Tensor) -> Tensor:
    """Index of each token in its run of equal segments, int64 [B, S]."""
    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - index.where(starts, 0).cummax(dim=1).values


def document_lengths(position_ids: Tensor) -> list[list[int]]:
    """Tokens of each document of each row, in the row's order; padding at the end counts as one."""
    rows = []
    for positions in position_ids:
        borders = torch.cat((positions.eq(0).nonzero().flatten(), torch.tensor([len(positions)])))
        rows.append(borders.diff().tolist())
    return rows


def num_scored(labels: Tensor) -> int:
    """How many tokens the loss of a micro-batch is a mean over; the first of a row is never predicted."""
    return int((labels[:, 1:] != UNSCORED).sum())


def _segments(rows: Sequence[Row]) -> Tensor:
    return torch.from_numpy(np.stack([row.segments for row in rows])).long()
