"""Training rows as text: the first rows of a run, the documents that a row joins set apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from clex_train.config.data import DataConfig
from clex_train.data.build import PACKINGS
from clex_train.data.order import ShuffledRows
from clex_train.data.rows import PADDING, Row
from clex_train.data.store import TokenStore
from clex_train.utils.protocols import Tokenizer
from data_prep.config import InspectVerb


def lines(store: TokenStore, tokenizer: Tokenizer, config: InspectVerb) -> Iterator[str]:
    """Describe rows 0 to `config.rows` - 1 of a run of `config.seed` on the training split alone."""
    if store.num_tokens < config.seq_len:
        yield f"  none: {store.num_tokens:,} {store.split_name} tokens are fewer than seq_len={config.seq_len}"
        return
    packed = PACKINGS[config.packing](store, DataConfig(seq_len=config.seq_len, packing=config.packing))
    yield f"  {packed.summary()}"
    order = ShuffledRows(packed, config.seed)
    for index in range(config.rows):
        row = order[index]
        yield f"  row {index} of a run of seed {config.seed} ({order.position(index):,} in the order of the store)"
        yield from _pieces(row, store.eos_id, tokenizer)


def _pieces(row: Row, eos_id: int, tokenizer: Tokenizer) -> Iterator[str]:
    borders = [0, *(np.flatnonzero(np.diff(row.segments)) + 1).tolist(), len(row.tokens)]
    for number, (start, stop) in enumerate(pairwise(borders), start=1):
        if row.segments[start] == PADDING:
            yield f"    --- padding, {stop - start} tokens"
            continue
        ends = "ends in this row" if row.tokens[stop - 1] == eos_id else "goes on beyond this row"
        yield f"    --- document {number} of the row, {stop - start} tokens, {ends}"
        yield f"    {tokenizer.decode(row.tokens[start:stop].tolist())!r}"
