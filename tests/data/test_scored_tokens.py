"""Scored tokens of conversations: the same ones in every packing, and a loss that is a mean over them alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clex_train.config.data import DataConfig, DomainConfig, Packing
from clex_train.config.optim import OptimConfig
from clex_train.data.batch import UNSCORED, collate_documents, collate_rows
from clex_train.data.build import build_rows, open_stores, pack
from clex_train.data.rows import PADDING
from clex_train.data.shards import shard_batch
from clex_train.token_store.writer import write_store

SEQ_LEN = 32


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Write a store whose odd ids, and they alone, are scored."""
    random = np.random.default_rng(0)
    documents = [random.integers(1, 99, random.integers(3, 60)).tolist() for _ in range(60)]
    masks = [[*(token % 2 == 1 for token in document), False] for document in documents]
    write_store(tmp_path / "chats", {"train": documents}, 100, masks={"train": masks})
    return tmp_path / "chats"


@pytest.mark.parametrize("packing", [Packing.concat, Packing.best_fit])
def test_every_packing_carries_the_mask_to_its_token(chats: Path, packing: Packing) -> None:
    data = DataConfig(path=str(chats), seq_len=SEQ_LEN, packing=packing)
    [rows] = pack(open_stores(data), data).values()
    assert len(rows) > 10
    for index in range(len(rows)):
        row = rows[index]
        assert row.scored is not None
        used = row.segments != PADDING
        assert row.scored[used].tolist() == [token % 2 == 1 for token in row.tokens[used]]
        assert not row.scored[~used].any()


@pytest.mark.parametrize("collate", [collate_rows, collate_documents])
def test_a_target_is_the_next_token_if_that_one_is_scored(chats: Path, collate) -> None:
    data = DataConfig(path=str(chats), seq_len=SEQ_LEN, packing=Packing.best_fit)
    [rows] = pack(open_stores(data), data).values()
    batch = collate([rows[0], rows[1]])
    following = torch.nn.functional.pad(batch.token_ids[:, 1:], (0, 1))
    kept = batch.targets != UNSCORED
    assert kept.any()
    assert torch.equal(batch.targets[kept], following[kept])
    assert (following[kept] % 2 == 1).all()
    # None is lost either, but the first tokens of documents that are masked from each other.
    borders = (
        torch.zeros_like(kept) if batch.document_positions is None else (batch.document_positions == 0).roll(-1, 1)
    )
    padding = torch.from_numpy(np.stack([rows[0].segments, rows[1].segments])).roll(-1, 1) == PADDING
    expected = (following % 2 == 1) & ~borders & ~padding
    expected[:, -1] = False
    assert torch.equal(kept, expected)


def test_shards_of_a_row_share_its_scored_tokens(chats: Path) -> None:
    data = DataConfig(path=str(chats), seq_len=SEQ_LEN, packing=Packing.best_fit)
    [rows] = pack(open_stores(data), data).values()
    whole = collate_rows([rows[2]])
    parts = [shard_batch(whole, index, 3) for index in range(3)]
    assert sum(part.num_scored for part in parts) == whole.num_scored
    assert torch.cat([part.targets for part in parts], dim=1)[:, :SEQ_LEN].equal(whole.targets)


def test_a_mixture_scores_all_tokens_of_plain_text_and_the_masked_ones_of_conversations(
    chats: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "books", {"train": [[2] * 500]}, 100)
    # The same vocabulary, so that the two may be mixed.
    domains = {"chat": DomainConfig(str(chats), 3), "book": DomainConfig(str(tmp_path / "books"), 1)}
    data = DataConfig(domains=domains, seq_len=SEQ_LEN)
    rows = build_rows(pack(open_stores(data), data), data, seed=0, batch_rows=OptimConfig().batch_rows)
    batch = collate_rows([rows[index] for index in range(8)])
    is_book = (batch.token_ids[:, :-1] == 2).all(dim=1)
    assert int(is_book.sum()) == 2
    scored = (batch.targets != UNSCORED).sum(dim=1)
    assert (scored[is_book] == SEQ_LEN - 1).all()
    assert (scored[~is_book] < SEQ_LEN - 1).all()
