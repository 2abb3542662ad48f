"""Show training rows as text: the first rows of a run, with the documents of a row separated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from clex_train.config.data import DataConfig
from clex_train.data.build import PACKINGS
from clex_train.data.rows import PADDING, Row
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store.store import TokenStore
from clex_train.utils.protocols import Tokenizer
from data_prep.config import InspectVerb


def lines(store: TokenStore, tokenizer: Tokenizer, config: InspectVerb) -> Iterator[str]:
    """Yield lines that describe the first `config.rows` rows of a run of `config.seed` on the training split."""
    if store.num_tokens < config.seq_len:
        yield f"  none: {store.num_tokens:,} {store.split_name} tokens are fewer than seq_len={config.seq_len}"
        return
    # The classes of training, so that these are the rows of a run with this packing, length and seed.
    packed = PACKINGS[config.packing](store, DataConfig(seq_len=config.seq_len, packing=config.packing))
    yield f"  {packed.summary()}"
    order = ShuffledRows(packed, config.seed)
    for index in range(config.rows):
        row = order[index]
        yield f"  row {index} of a run of seed {config.seed} ({order.position(index):,} in the order of the store)"
        yield from _pieces(row, store.eos_id, tokenizer)


def _pieces(row: Row, eos_id: int, tokenizer: Tokenizer) -> Iterator[str]:
    # A document begins where the segment number changes; the token ids alone do not show a cut one.
    borders = [0, *(np.flatnonzero(np.diff(row.segments)) + 1).tolist(), len(row.tokens)]
    for number, (start, stop) in enumerate(pairwise(borders), start=1):
        if row.segments[start] == PADDING:
            yield f"    --- padding, {stop - start} tokens"
            continue
        ends = "ends in this row" if row.tokens[stop - 1] == eos_id else "continues beyond this row"
        yield f"    --- document {number} of the row, {stop - start} tokens, {ends}"
        yield f"    {tokenizer.decode(row.tokens[start:stop].tolist())!r}"
