"""Statistics of a split: documents and tokens by length and by source, in one pass over its document tables.

A length bin is a doubling: bin k holds the documents of 2^k to 2^(k+1) - 1 tokens, EOS included. Memory is bounded by
`CHUNK_DOCUMENTS` documents, independent of the number of shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from clex_train.token_store.manifest import Source
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError

CHUNK_DOCUMENTS = 1 << 20
NUM_CLASSES = 63
"""Bins of length, enough for any int64."""


@dataclass(frozen=True)
class Statistics:
    """Sums over the documents of a split."""

    documents: np.ndarray
    """int64 [63]: documents in each length bin."""
    tokens: np.ndarray
    """int64 [63]: their tokens."""
    source_documents: np.ndarray
    """int64 [max(sources, 1)]: documents of each source in the manifest."""
    source_tokens: np.ndarray
    """int64 [max(sources, 1)]: their tokens."""
    longest: int
    """Tokens of the longest document."""

    def classes(self) -> range:
        """Return the range from the bin of the shortest document to that of the longest."""
        used = np.flatnonzero(self.documents)
        return range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)


@dataclass(frozen=True)
class Domain:
    """Sources of one directory, or one hub data set, in a split."""

    name: str
    num_documents: int
    num_tokens: int


def collect(store: TokenStore) -> Statistics:
    """Read the document tables of a split.

    Raises:
        ConfigError: a table is damaged: it has a document without tokens, or of an unknown source.
    """
    num_sources = max(1, len(store.manifest.sources))
    by_length, by_source = np.zeros((2, NUM_CLASSES), np.int64), np.zeros((2, num_sources), np.int64)
    longest = 0
    for shard, (_, table) in zip(store.shards, store.document_tables(), strict=True):
        file = store.path / store.split_name / f"{shard.name}.documents"
        # Documents of a shard follow each other, so only the end of the previous chunk is needed.
        before = 0
        for first in range(0, len(table), CHUNK_DOCUMENTS):
            records = table[first : first + CHUNK_DOCUMENTS]
            # Ends of documents give their lengths; the first one starts where the last chunk ended.
            lengths, sources = np.diff(records["stop"], prepend=before), records["source"]
            _check(file, lengths, sources, num_sources)
            before = int(records["stop"][-1])
            longest = max(longest, int(lengths.max()))
            by_length += _sums(np.log2(lengths).astype(np.int64), lengths, NUM_CLASSES)
            by_source += _sums(sources, lengths, num_sources)
        if before != shard.num_tokens:
            raise _damaged(file)
    return Statistics(by_length[0], by_length[1], by_source[0], by_source[1], longest)


def domains(sources: list[Source], statistics: Statistics) -> list[Domain]:
    """Sum a split by domain, the most tokens first; a domain is a folder below the common ones, or a hub data set."""
    sums: dict[str, tuple[int, int]] = {}
    pairs = zip(statistics.source_documents.tolist(), statistics.source_tokens.tolist(), strict=True)
    for name, (documents, tokens) in zip(domain_names(sources), pairs, strict=False):
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + documents, before[1] + tokens)
    found = [Domain(name, documents, tokens) for name, (documents, tokens) in sums.items() if documents]
    return sorted(found, key=lambda domain: (-domain.num_tokens, domain.name))


def domain_names(sources: list[Source]) -> list[str]:
    """Name each source by its first folder below those that all files share, or else by the last common folder."""
    folders = [() if source.is_part else PurePath(source.path).parent.parts for source in sources]
    files = [parts for source, parts in zip(sources, folders, strict=True) if not source.is_part]
    depth = 0
    # The common prefix of all paths does not identify a domain.
    while files and all(len(parts) > depth and parts[depth] == files[0][depth] for parts in files):
        depth += 1
    return [
        source.path if source.is_part else (parts[depth] if len(parts) > depth else (parts[-1:] or (".",))[0])
        for source, parts in zip(sources, folders, strict=True)
    ]


def _sums(groups: np.ndarray, lengths: np.ndarray, num_groups: int) -> np.ndarray:
    """Return int64 [2, num_groups]: documents and tokens of each group."""
    # bincount sums weights in float64, which is exact below 2^53 tokens.
    tokens = np.bincount(groups, weights=lengths, minlength=num_groups)
    return np.stack([np.bincount(groups, minlength=num_groups), tokens.astype(np.int64)])


def _check(file: Path, lengths: np.ndarray, sources: np.ndarray, num_sources: int) -> None:
    if lengths.min() < 1 or sources.min() < 0 or sources.max() >= num_sources:
        raise _damaged(file)


def _damaged(file: Path) -> ConfigError:
    return ConfigError(
        file, None, "damaged, its documents are not those of the manifest; copy it again or tokenize again"
    )
