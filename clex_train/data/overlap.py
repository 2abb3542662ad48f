"""Documents that are in both of two splits, found by the hash of their text.

The smaller side's hashes are sorted in memory (8 bytes a document); the larger side is streamed from its tables.
Nearly all of its hashes are told apart by their first 22 bits, in a table that fits a cache, before any is looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from clex_train.data.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError

logger = log.get(__name__)

CHUNK_DOCUMENTS = 1 << 20
_SHIFT = np.uint64(64 - 22)


@dataclass(frozen=True)
class Overlap:
    """`num_held_out` held-out documents are training documents too; `train_doc` and `held_out_doc` are one pair."""

    num_held_out: int
    train_doc: int
    held_out_doc: int


def overlap(train: TokenStore, held_out: TokenStore) -> Overlap | None:
    """Documents of equal text in two splits, or None; the example is that of the smallest hash.

    Memory: 8 bytes a document of the smaller split, twice, and a few megabytes.
    """
    small, large = sorted((train, held_out), key=lambda store: store.num_documents)
    shared = _values_in(large, np.unique(small.text_hashes()))
    if not len(shared):
        return None
    count = sum(len(doc_ids) for doc_ids, _ in _matches(held_out, shared))
    return Overlap(count, _first(train, shared[:1]), _first(held_out, shared[:1]))


def require_disjoint(train: Iterable[TokenStore], held_out: TokenStore, allow_overlap: bool = False) -> None:
    """Refuse to evaluate on documents that are trained on, or warn of it where `allow_overlap` is set.

    Args:
        train: the training split of each store of the run.
        held_out: the split that is evaluated.

    Raises:
        ValueError: a text is on both sides; says how many are, one of them by its origin on both sides, and the remedy.
    """
    from clex_train.utils import distributed  # here: a program that only tokenises needs no torch

    for store in train:
        found = overlap(store, held_out)
        if not found:
            continue
        facts = (
            f"{found.num_held_out} of its {held_out.num_documents} "
            f"{held_out.split_name} documents are training documents of data.path={store.path} as well, such as "
            f"{held_out.place(found.held_out_doc)}, in training {store.place(found.train_doc)}"
        )
        if not allow_overlap:
            raise ConfigError(
                "evaluation.path",
                held_out.path,
                f"{facts}; name another store by evaluation.path, remove them by `python -m data_prep decontaminate`, "
                "or evaluate on them on purpose with evaluation.allow_overlap=true",
            )
        if distributed.is_main():
            logger.warning("evaluation.path=%s: %s; evaluation.allow_overlap=true", held_out.path, facts)


def _values_in(store: TokenStore, wanted: np.ndarray) -> np.ndarray:
    """uint64, sorted: those of the sorted `wanted` hashes that the split has."""
    parts = [values for _, values in _matches(store, wanted)]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _first(store: TokenStore, wanted: np.ndarray) -> int:
    return int(next(doc_ids.min() for doc_ids, _ in _matches(store, wanted) if len(doc_ids)))


def _matches(store: TokenStore, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (doc_ids, hashes) of documents whose hash is among the sorted `wanted`, for a chunk of them at a time."""
    if not len(wanted):
        return
    maybe = np.zeros(1 << 22, bool)
    maybe[wanted >> _SHIFT] = True
    for first_doc, records in store.document_tables():
        for start in range(0, len(records), CHUNK_DOCUMENTS):
            hashes = np.ascontiguousarray(records[start : start + CHUNK_DOCUMENTS]["text_hash"])
            candidates = np.flatnonzero(maybe[hashes >> _SHIFT])
            # In ascending order neighbours look at the same places; at random each would miss the cache.
            candidates = candidates[np.argsort(hashes[candidates])]
            values = hashes[candidates]
            places = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
            same = wanted[places] == values
            yield first_doc + start + candidates[same], values[same]
