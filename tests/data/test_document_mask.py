"""Micro-batches of rows whose documents are joined or kept apart: labels, positions, and what is counted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clex_train.data.batch import UNSCORED, document_lengths, joined, num_scored, positions_in, separated
from clex_train.data.rows import PADDING, Row

ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=24), st.integers(0, 5)), min_size=1, max_size=4
)


def row(lengths: list[int], padding: int = 0, index: int = 0) -> Row:
    """A row of documents of `lengths` tokens and a tail of `padding`; every token id is another one."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    segments = np.concatenate((segments, np.full(padding, PADDING))).astype(np.int32)
    return Row(np.arange(100 * index, 100 * index + len(segments), dtype=np.int64), segments, index)


def of_equal_length(layouts: list[tuple[list[int], int]]) -> list[Row]:
    """Rows of 30 tokens with the documents of `layouts`, cut where they are longer and padded where shorter."""
    rows = []
    for index, (lengths, padding) in enumerate(layouts):
        segments = np.repeat(np.arange(len(lengths)), lengths)[: 30 - padding]
        cut = np.bincount(segments).tolist()
        rows.append(row(cut, 30 - sum(cut), index))
    return rows


def test_documents_that_are_joined_are_scored_throughout():
    batch = joined([row([3, 5], index=4), row([8], index=5)])
    assert batch.keys() == {"input_ids", "labels", "row_index"}
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["row_index"].tolist() == [4, 5]
    assert num_scored(batch["labels"]) == 2 * 7, "the first token of a row has nothing before it"


def test_padding_is_never_scored():
    for collate in (joined, separated):
        batch = collate([row([3, 2], padding=3)])
        assert batch["labels"][0, 5:].tolist() == [UNSCORED] * 3
        assert batch["input_ids"][0].tolist() == list(range(8)), "what is read stays as it is"
    assert num_scored(joined([row([3, 2], padding=3)])["labels"]) == 4


def test_documents_kept_apart_restart_and_their_first_tokens_are_not_scored():
    batch = separated([row([3, 1, 1, 2], padding=2), row([9], index=7)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0, 1, 0, 1], list(range(9))]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 3, PADDING, PADDING], [0] * 9]
    assert batch["labels"].tolist() == [
        [UNSCORED, 1, 2, UNSCORED, UNSCORED, UNSCORED, 6, UNSCORED, UNSCORED],
        [UNSCORED, *range(701, 709)],
    ]
    assert num_scored(batch["labels"]) == 2 + 1 + 8
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@given(ROWS)
def test_positions_and_lengths_are_those_of_a_walk_over_the_row(layouts: list[tuple[list[int], int]]):
    rows = of_equal_length(layouts)
    batch = separated(rows)
    for number, (made, positions) in enumerate(zip(rows, batch["position_ids"].tolist(), strict=True)):
        expected, lengths, before = [], [], None
        for segment in made.segments.tolist():
            expected.append(expected[-1] + 1 if segment == before else 0)
            lengths = [*lengths[:-1], lengths[-1] + 1] if segment == before else [*lengths, 1]
            before = segment
        assert positions == expected
        assert document_lengths(batch["position_ids"])[number] == lengths
    scored = sum(max(0, n - 1) for made in rows for n in np.bincount(made.segments[made.segments >= 0]).tolist())
    assert num_scored(batch["labels"]) == scored


def test_labels_are_a_copy_of_their_own():
    for collate in (joined, separated):
        batch = collate([row([4, 4])])
        batch["labels"][:] = UNSCORED
        assert (batch["input_ids"] >= 0).all()


@pytest.mark.parametrize("segments", [[[5]], [[2, 2, 3]], [[0], [1]]])
def test_positions_need_no_more_than_equal_neighbours(segments: list[list[int]]):
    assert positions_in(torch.tensor(segments))[:, 0].eq(0).all()
