"""Sharding of sequences for sequence parallelism: parts, shifted labels, positions and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data import shards
from clex_train.data.batch import UNSCORED, collate_documents, collate_rows
from clex_train.data.rows import PADDING, Row


def row(lengths, padding=0, index=0):
    """Build a row of documents of `lengths` tokens, with `padding` behind them."""
    segments = np.repeat([*range(len(lengths)), PADDING], [*lengths, padding]).astype(np.int32)
    return Row(np.random.default_rng(index).integers(3, 200, sum(lengths) + padding), segments, index)


layouts = st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 9))


@settings(max_examples=50)
@given(layouts, st.integers(2, 6), st.sampled_from([collate_rows, collate_documents]))
def test_shards_have_every_token_once_and_predict_the_next_token_of_the_row(layout, count, collate):
    rows = [row(*layout, index=4), row([sum(layout[0]) + layout[1]], index=9)]
    whole, length = collate(rows), len(rows[0].tokens)
    parts = [shards.shard_collate(collate, index, count)(rows) for index in range(count)]
    ids, targets = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("token_ids", "targets"))
    assert len({part.token_ids.shape for part in parts}) == 1
    assert torch.equal(ids[:, :length], whole.token_ids)
    assert torch.equal(targets[:, :length], whole.targets)
    assert (targets[:, length - 1 :] == UNSCORED).all(), "nothing follows the last token, and padding is not scored"
    assert sum(part.num_scored for part in parts) == whole.num_scored
    assert all(torch.equal(part.row_indices, whole.row_indices) for part in parts)


def test_unsharded_rows_are_collated_unchanged():
    assert shards.shard_collate(collate_rows, 0, 1) is collate_rows


def test_positions_of_one_document_continue_over_the_padding():
    batch = shards.shard_batch(collate_rows([row([7]), row([7])]), 0, 2)
    assert shards.padded_positions(batch, 7, 2).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2


def test_positions_of_documents_restart_at_the_padding_of_a_shard():
    batch = shards.shard_batch(collate_documents([row([3, 1], padding=1), row([5])]), 1, 3)
    assert shards.padded_positions(batch, 5, 3).tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize(("length", "count"), [(8, 2), (7, 2), (3, 8)])
def test_a_shard_is_padded_with_the_given_value(length, count):
    whole = torch.arange(1, 2 * length + 1).view(2, length)
    parts = torch.cat([shards.shard(whole, index, count, fill=-5) for index in range(count)], dim=1)
    assert parts.shape[1] == count * shards.part_len(length, count)
    assert torch.equal(parts[:, :length], whole)
    assert (parts[:, length:] == -5).all()
