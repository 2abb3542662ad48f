"""A token store: any span of a split's tokens, and where its documents begin and end.

Opening reads the manifest and the tables of documents, which are checked as a whole (28 bytes a document, once in a
process); tokens are read and checked when a row needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from clex_train.data.manifest import SPLITS, TOKENIZER, Manifest, Shard, read_manifest
from clex_train.data.shard_files import DocumentTable, TokenFile, check_sizes, checked_index
from clex_train.utils.errors import ConfigError

MAX_OPEN_SHARDS = 64


class TokenStore:
    """One split of a store, its shards joined into a single sequence of `num_tokens` tokens.

    `TokenStore(path)` is the training split; `.split("validation")` the documents held out.

    Raises:
        ValueError: no store at `path`, or one that is half written, damaged or of an unknown format.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        assert split in SPLITS, split
        self.path = Path(path)
        self.split_name = split
        self.manifest: Manifest = read_manifest(self.path)
        self.dtype = np.dtype(self.manifest.dtype)
        self._shards = [shard for shard in self.manifest.splits[split] if shard.num_documents]
        self._token_starts = _starts([shard.num_tokens for shard in self._shards])
        self._document_starts = _starts([shard.num_documents for shard in self._shards])
        self._check_files()
        # A mixture of stores of thousands of shards must not keep all files open.
        self._tokens_of = lru_cache(MAX_OPEN_SHARDS)(self._open_tokens)
        self._documents_of = lru_cache(MAX_OPEN_SHARDS)(self._open_documents)

    @property
    def num_tokens(self) -> int:
        """Tokens of this split, one EOS per document included."""
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents of this split."""
        return int(self._document_starts[-1])

    @property
    def has_block_sums(self) -> bool:
        """Return True if flipped bits are seen where tokens are read: not in stores of earlier versions."""
        return all(shard.blocks_sha256 for shard in self._shards)

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.tokenizer.eos_id

    @property
    def bos(self) -> bool:
        """Return True if every document begins with BOS."""
        return bool(self.manifest.bos)

    @property
    def shards(self) -> list[Shard]:
        """The shards of this split that hold documents, in order."""
        return list(self._shards)

    @property
    def tokenizer_path(self) -> Path:
        """Directory with the tokenizer that wrote the store, in the Hugging Face layout."""
        return self.path / TOKENIZER

    @property
    def fingerprint(self) -> str:
        """sha256 of the store's content, both splits: equal for equal tokens, wherever the store lies."""
        return self.manifest.fingerprint()

    @cached_property
    def doc_offsets(self) -> np.ndarray:
        """int64 [D+1]: document `d` is the span [doc_offsets[d], doc_offsets[d+1]), its EOS included."""
        stops = [self._documents_of(i)[:]["stop"] + self._token_starts[i] for i in range(len(self._shards))]
        return np.concatenate([np.zeros(1, np.int64), *stops])

    def split(self, name: str) -> TokenStore:
        """The view on split `name`, "train" or "validation".

        Raises:
            ValueError: the split has no documents.
        """
        view = TokenStore(self.path, name)
        if view.num_documents == 0:
            raise ConfigError(
                "data.path",
                self.path,
                f"the store has no {name} documents; tokenise again with another "
                f"corpus.validation_share (now {self.manifest.split_rule.get('validation_share')})",
            )
        return view

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids [stop - start] of the span in the store's own dtype; read-only where it lies in one shard.

        Raises:
            IndexError: the span is not within [0, num_tokens].
            DamagedStore: a block has not its checksum, or a file was cut short; a `ValueError`.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.path}/{self.split_name}")
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            parts.append(self._tokens_of(shard).read(start - base, min(stop, end) - base))
            start, shard = min(stop, end), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def segments(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: which of the span's documents each of its tokens belongs to, counted from 0.

        Looks up the span's own borders alone, by bisection in the shards' tables; arguments as `tokens`.
        """
        borders = self._borders(start, stop)
        if not len(borders):
            return np.zeros(stop - start, np.int32)
        steps = np.zeros(stop - start, np.int32)
        steps[borders - start] = 1
        return np.cumsum(steps, dtype=np.int32)

    def documents(self, min_tokens: int = 1) -> Iterator[tuple[int, int, int]]:
        """Yield (doc_id, start, stop) of documents of at least `min_tokens` tokens, EOS included, in store order."""
        offsets = self.doc_offsets
        for doc_id in np.flatnonzero(np.diff(offsets) >= min_tokens):
            yield int(doc_id), int(offsets[doc_id]), int(offsets[doc_id + 1])

    def origin(self, doc_id: int) -> str:
        """Where a document came from: source file and record (line, row or file number in it, from 1)."""
        shard = int(np.searchsorted(self._document_starts, doc_id, side="right")) - 1
        index = doc_id - int(self._document_starts[shard])
        (record,) = self._documents_of(shard)[index : index + 1]
        source = self.manifest.sources[int(record["source"])]
        place = f" (from byte {source.start})" if source.start else ""
        if source.is_part:
            place = f" (part {source.start} of {source.stop})"
        return f"{source.path}{place}: record {int(record['record'])}"

    def place(self, doc_id: int) -> str:
        """The origin of a document, or its index where the store knows no sources."""
        return self.origin(doc_id) if self.manifest.sources else f"document {doc_id}"

    def span(self, doc_id: int) -> tuple[int, int]:
        """(start, stop) of one document's tokens, EOS included, from its shard's table alone."""
        shard = int(np.searchsorted(self._document_starts, doc_id, side="right")) - 1
        record = doc_id - int(self._document_starts[shard])
        start, stop = self._documents_of(shard).span(record)
        base = int(self._token_starts[shard])
        return base + start, base + stop

    def text_hashes(self) -> np.ndarray:
        """uint64 [D]: a hash of each document's text; equal for equal documents, in any store."""
        hashes = [self._documents_of(i)[:]["text_hash"] for i in range(len(self._shards))]
        return np.concatenate([np.empty(0, np.uint64), *hashes])

    def document_tables(self) -> Iterator[tuple[int, DocumentTable]]:
        """Yield (first doc_id, table of `DOCUMENT` records, to be read by slices) of each shard, in order."""
        for i, first_doc in enumerate(self._document_starts[:-1]):
            yield int(first_doc), self._documents_of(i)

    def _borders(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin strictly within the span."""
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            last = min(stop, end) - base
            parts.append(self._documents_of(shard).stops_between(start - base, last) + base)
            if base + last < stop:
                parts.append(np.array([end]))
            start, shard = base + last, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def _open_tokens(self, shard: int) -> TokenFile:
        vocab_size = self.manifest.tokenizer.vocab_size
        return TokenFile(self.path, self._file(shard, "tokens"), self._shards[shard], self.dtype, vocab_size)

    def _open_documents(self, shard: int) -> DocumentTable:
        return DocumentTable(self.path, self._file(shard, "documents"), self._shards[shard])

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / self.split_name / f"{self._shards[shard].name}.{suffix}"

    def _check_files(self) -> None:
        for i, shard in enumerate(self._shards):
            check_sizes(self.path, self._file(i, "tokens"), shard, self.dtype)
            checked_index(self.path, self._file(i, "documents"), shard)


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
