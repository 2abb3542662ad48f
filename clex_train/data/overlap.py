"""Find documents that two splits share, by the hash of their text.

Hashes of the smaller split are sorted in memory (8 bytes a document); the tables of the larger split are streamed.
A bitmap over the first 22 bits, small enough for a CPU cache, rules out nearly all hashes before the binary search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from clex_train.token_store.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError

logger = log.get(__name__)

CHUNK_DOCUMENTS = 1 << 20
# 2^22 one-byte flags are 4 MiB: they fit the L2 or L3 cache, and a split of 10^5 documents fills 2 % of them.
_SHIFT = np.uint64(64 - 22)


@dataclass(frozen=True)
class Overlap:
    """Number of held-out documents that are also training documents, and one such pair of document ids."""

    num_held_out: int
    train_doc: int
    held_out_doc: int


def overlap(train: TokenStore, held_out: TokenStore) -> Overlap | None:
    """Find documents of equal text in two splits; None if there are none. The example has the smallest hash.

    Memory: 16 bytes a document of the smaller split and a few MiB.
    """
    small, large = sorted((train, held_out), key=lambda store: store.num_documents)
    shared = _values_in(large, np.unique(small.text_hashes()))
    if not len(shared):
        return None
    count = sum(len(doc_ids) for doc_ids, _ in _matches(held_out, shared))
    return Overlap(count, _first(train, shared[:1]), _first(held_out, shared[:1]))


def require_disjoint(train: Iterable[TokenStore], held_out: TokenStore, allow_overlap: bool = False) -> None:
    """Refuse to evaluate on training documents, or only warn if `allow_overlap` is set.

    Args:
        train: the training split of each store of the run.
        held_out: the split to evaluate on.
        allow_overlap: warn instead of raising.

    Raises:
        ConfigError: a text is in both; names the count, the origin of one document on both sides, and the remedy.
    """
    from clex_train.utils import distributed  # imported late: tokenizing alone needs no torch

    for store in train:
        found = overlap(store, held_out)
        if not found:
            continue
        facts = (
            f"{found.num_held_out} of its {held_out.num_documents} "
            f"{held_out.split_name} documents are also training documents of data.path={store.path}, such as "
            f"{held_out.place(found.held_out_doc)}, in training {store.place(found.train_doc)}"
        )
        if not allow_overlap:
            raise ConfigError(
                "evaluation.path",
                held_out.path,
                f"{facts}; choose another store with evaluation.path, remove them with `python -m data_prep "
                "decontaminate`, or evaluate on them deliberately with evaluation.allow_overlap=true",
            )
        if distributed.is_main():
            logger.warning("evaluation.path=%s: %s; evaluation.allow_overlap=true", held_out.path, facts)


def _values_in(store: TokenStore, wanted: np.ndarray) -> np.ndarray:
    """Return the sorted uint64 hashes of `wanted` (sorted) that the split has."""
    parts = [values for _, values in _matches(store, wanted)]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _first(store: TokenStore, wanted: np.ndarray) -> int:
    return int(next(doc_ids.min() for doc_ids, _ in _matches(store, wanted) if len(doc_ids)))


def _matches(store: TokenStore, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (doc_ids, hashes) of documents whose hash is in `wanted` (sorted), chunk by chunk."""
    if not len(wanted):
        return
    maybe = np.zeros(1 << 22, bool)
    maybe[wanted >> _SHIFT] = True
    for first_doc, records in store.document_tables():
        for start in range(0, len(records), CHUNK_DOCUMENTS):
            hashes = np.ascontiguousarray(records[start : start + CHUNK_DOCUMENTS]["text_hash"])
            candidates = np.flatnonzero(maybe[hashes >> _SHIFT])
            # Sorted queries make neighbouring searches touch the same cache lines; in random order each one misses.
            candidates = candidates[np.argsort(hashes[candidates])]
            values = hashes[candidates]
            places = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
            same = wanted[places] == values
            yield first_doc + start + candidates[same], values[same]
