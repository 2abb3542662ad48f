"""Collating micro batches with and without a document mask: labels, positions and counts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clex_train.data.batch import (
    UNSCORED,
    collate_documents,
    collate_rows,
    document_lengths,
    positions_in_segments,
)
from clex_train.data.rows import PADDING, Row

ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=24), st.integers(0, 5)), min_size=1, max_size=4
)


def row(lengths: list[int], padding: int = 0, index: int = 0) -> Row:
    """Build a row of documents of `lengths` tokens and `padding` behind them; all token ids differ."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    segments = np.concatenate((segments, np.full(padding, PADDING))).astype(np.int32)
    return Row(np.arange(100 * index, 100 * index + len(segments), dtype=np.int64), segments, index)


def rows_of_30(layouts: list[tuple[list[int], int]]) -> list[Row]:
    """Build rows of 30 tokens with the documents of `layouts`, cut or padded to fit."""
    rows = []
    for index, (lengths, padding) in enumerate(layouts):
        segments = np.repeat(np.arange(len(lengths)), lengths)[: 30 - padding]
        cut = np.bincount(segments).tolist()
        rows.append(row(cut, 30 - sum(cut), index))
    return rows


def test_every_token_of_joined_documents_is_scored():
    batch = collate_rows([row([3, 5], index=4), row([8], index=5)])
    assert batch.document_positions is None
    assert torch.equal(batch.targets[:, :-1], batch.token_ids[:, 1:])
    assert batch.targets[:, -1].tolist() == [UNSCORED] * 2, "nothing follows the last token of a row"
    assert batch.row_indices.tolist() == [4, 5]
    assert batch.num_scored == 2 * 7


def test_padding_is_never_scored():
    for collate in (collate_rows, collate_documents):
        batch = collate([row([3, 2], padding=3)])
        assert batch.targets[0, 4:].tolist() == [UNSCORED] * 4
        assert batch.token_ids[0].tolist() == list(range(8)), "what is read stays as it is"
    assert collate_rows([row([3, 2], padding=3)]).num_scored == 4


def test_masked_documents_restart_positions_and_their_first_tokens_are_not_scored():
    batch = collate_documents([row([3, 1, 1, 2], padding=2), row([9], index=7)])
    assert batch.document_positions.tolist() == [[0, 1, 2, 0, 0, 0, 1, 0, 1], list(range(9))]
    assert batch.targets.tolist() == [
        [1, 2, UNSCORED, UNSCORED, UNSCORED, 6, UNSCORED, UNSCORED, UNSCORED],
        [*range(701, 709), UNSCORED],
    ]
    assert batch.num_scored == 2 + 1 + 8
    for name in ("token_ids", "targets", "document_positions", "row_indices"):
        assert getattr(batch, name).dtype == torch.int64, name


@given(ROWS)
def test_positions_and_lengths_match_a_plain_loop(layouts: list[tuple[list[int], int]]):
    rows = rows_of_30(layouts)
    batch = collate_documents(rows)
    for number, (made, positions) in enumerate(zip(rows, batch.document_positions.tolist(), strict=True)):
        expected, lengths, before = [], [], None
        for segment in made.segments.tolist():
            expected.append(expected[-1] + 1 if segment == before else 0)
            lengths = [*lengths[:-1], lengths[-1] + 1] if segment == before else [*lengths, 1]
            before = segment
        assert positions == expected
        assert document_lengths(batch.document_positions)[number] == lengths
    scored = sum(max(0, n - 1) for made in rows for n in np.bincount(made.segments[made.segments >= 0]).tolist())
    assert batch.num_scored == scored


def test_targets_are_a_separate_copy():
    for collate in (collate_rows, collate_documents):
        batch = collate([row([4, 4])])
        batch.targets[:] = UNSCORED
        assert (batch.token_ids >= 0).all()


@pytest.mark.parametrize("segments", [[[5]], [[2, 2, 3]], [[0], [1]]])
def test_positions_depend_only_on_whether_neighbours_are_equal(segments: list[list[int]]):
    assert positions_in_segments(torch.tensor(segments))[:, 0].eq(0).all()
