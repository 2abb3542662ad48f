"""`MicroBatch`: the tensors of one forward pass, collated from rows with documents joined or masked from each other.

With `data.document_mask`, positions restart at every document, which is how transformers recognises document borders,
and the first token of a document is no target: only another document could predict it.
Shapes: `B` rows, `S` tokens of a row, `n` tokens of a row on this rank (S unless ranks share rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clex_train.data.rows import PADDING, Row

UNSCORED = -100
"""Target of a token that the loss leaves out, as in transformers and `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass, as int64 tensors on the CPU."""

    token_ids: Tensor
    """[B, n]: the tokens that this rank feeds to the model."""
    targets: Tensor
    """[B, n]: the next token of the row at each of them, shifted already; `UNSCORED` where none is predicted."""
    document_positions: Tensor | None
    """[B, S], always of whole rows: position of each token in its document, from 0; None if documents are joined."""
    row_indices: Tensor
    """[B]: index of each row in the order of the run, which sampled positions are a function of."""

    @property
    def masked_positions(self) -> Tensor:
        """`document_positions` of a micro-batch that was collated by `collate_documents`."""
        assert self.document_positions is not None, "collated by collate_rows: its documents are joined"
        return self.document_positions

    @property
    def num_scored(self) -> int:
        """Number of tokens that the loss is a mean over."""
        return int((self.targets != UNSCORED).sum())


Collate = Callable[[Sequence[Row]], MicroBatch]


def collate_rows(rows: Sequence[Row]) -> MicroBatch:
    """Collate rows as one document each: every token attends to all earlier tokens of its row."""
    tokens = _token_ids(rows)
    labels = tokens.masked_fill((_segments(rows) == PADDING) | ~_scored(rows), UNSCORED)
    return MicroBatch(tokens, _shift(labels), None, _row_indices(rows))


def collate_documents(rows: Sequence[Row]) -> MicroBatch:
    """Collate rows whose documents are masked from each other.

    A document that was cut at the end of a row starts again at position 0 in the next one. The padding of a row counts
    as one more document, none of whose tokens is scored.
    """
    tokens, segments = _token_ids(rows), _segments(rows)
    positions = positions_in_segments(segments)
    labels = tokens.masked_fill((segments == PADDING) | (positions == 0) | ~_scored(rows), UNSCORED)
    return MicroBatch(tokens, _shift(labels), positions, _row_indices(rows))


def positions_in_segments(segments: Tensor) -> Tensor:
    """Count the tokens of each run of equal segments from 0, int64 [B, S]."""
    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - index.where(starts, 0).cummax(dim=1).values


def document_lengths(document_positions: Tensor) -> list[list[int]]:
    """List the tokens of each document of each row, in the row's order; padding at the end counts as one document."""
    rows = []
    for positions in document_positions:
        borders = torch.cat((positions.eq(0).nonzero().flatten(), torch.tensor([len(positions)])))
        rows.append(borders.diff().tolist())
    return rows


def _shift(labels: Tensor) -> Tensor:
    # Shifted once, over whole rows: the last token of a rank's share predicts the first token of the next rank's.
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=UNSCORED)


def _token_ids(rows: Sequence[Row]) -> Tensor:
    return torch.from_numpy(np.stack([row.tokens for row in rows]))


def _segments(rows: Sequence[Row]) -> Tensor:
    return torch.from_numpy(np.stack([row.segments for row in rows])).long()


def _scored(rows: Sequence[Row]) -> Tensor:
    # A mixture has rows of conversations beside rows of plain text, whose tokens all count.
    masks = [np.ones(len(row.tokens), np.bool_) if row.scored is None else row.scored for row in rows]
    return torch.from_numpy(np.stack(masks))


def _row_indices(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([row.index for row in rows])
