"""Token store: read any span of a split's tokens, and the documents it consists of.

Opening a store reads its manifest and verifies its document tables as a whole, once per process (28 bytes a document).
Tokens are read and verified when a row needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from clex_train.token_store.manifest import SPLITS, TOKENIZER, Manifest, Shard, read_manifest
from clex_train.token_store.shard_files import DocumentTable, MaskFile, TokenFile, check_sizes, load_document_index
from clex_train.utils.errors import ConfigError

MAX_OPEN_SHARDS = 64
"""Open files per store and kind; a mixture of stores with thousands of shards would pass the usual limit of 1,024."""


class TokenStore:
    """One split of a store, its shards joined into a single sequence of `num_tokens` tokens.

    `TokenStore(path)` is the training split, `.split("validation")` the held-out documents.

    Raises:
        InputError: there is no store at `path`, or it is half written, damaged or of an unknown format.
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
        # Caches on the instance, not on the method: a class-level lru_cache would keep every store alive.
        self._token_file = lru_cache(MAX_OPEN_SHARDS)(self._open_tokens)
        self._document_table = lru_cache(MAX_OPEN_SHARDS)(self._open_documents)
        self._mask_file = lru_cache(MAX_OPEN_SHARDS)(self._open_mask)

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
        """True if flipped bits are noticed on reading; False for stores of earlier versions."""
        return all(shard.blocks_sha256 for shard in self._shards)

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.tokenizer.eos_id

    @property
    def bos(self) -> bool:
        """True if every document begins with BOS."""
        return bool(self.manifest.bos)

    @property
    def shards(self) -> list[Shard]:
        """The shards of this split that hold documents, in order."""
        return list(self._shards)

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer that wrote the store, in Hugging Face layout."""
        return self.path / TOKENIZER

    @property
    def fingerprint(self) -> str:
        """Hash of the content of both splits: equal for equal tokens, wherever the store is."""
        return self.manifest.fingerprint()

    @cached_property
    def doc_offsets(self) -> np.ndarray:
        """int64 [D+1]: document `d` is the span [doc_offsets[d], doc_offsets[d+1]), EOS included."""
        # Loads every table (8 bytes a document in the result). `segments` and `span` get by without.
        stops = [self._document_table(i)[:]["stop"] + self._token_starts[i] for i in range(len(self._shards))]
        return np.concatenate([np.zeros(1, np.int64), *stops])

    def split(self, name: str) -> TokenStore:
        """Open split `name`, "train" or "validation", of the same store.

        Raises:
            ConfigError: the split has no documents.
        """
        view = TokenStore(self.path, name)
        if view.num_documents == 0:
            raise ConfigError(
                "data.path",
                self.path,
                f"the store has no {name} documents; tokenize again with another "
                f"corpus.validation_share (now {self.manifest.split_rule.get('validation_share')})",
            )
        return view

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return token ids [stop - start] in the store's dtype; read-only if the span lies in one shard.

        Raises:
            IndexError: the span is not within [0, num_tokens].
            DamagedStore: a checksum does not match or a file is too short; an `InputError`.
        """
        parts = [self._token_file(shard).read(first, last) for shard, first, last in self._spans(start, stop)]
        if len(parts) == 1:
            return parts[0]
        # The empty array makes an empty span concatenate to this dtype; concatenating nothing is an error.
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def scored(self, start: int, stop: int) -> np.ndarray | None:
        """Return bool [stop - start], True where the loss counts the token; None for a store without a mask.

        Arguments and errors as in `tokens`.
        """
        if not self.manifest.is_masked:
            return None
        parts = [self._mask_file(shard).read(first, last) for shard, first, last in self._spans(start, stop)]
        return np.concatenate([np.empty(0, np.bool_), *parts])

    def segments(self, start: int, stop: int) -> np.ndarray:
        """Return int32 [stop - start]: the document of each token, numbered from 0 within the span.

        Arguments and errors as in `tokens`. Bisects in the shards' tables and loads none as a whole.
        """
        borders = self._borders(start, stop)
        if not len(borders):
            return np.zeros(stop - start, np.int32)
        steps = np.zeros(stop - start, np.int32)
        # Mark the first token of each later document; the running sum then numbers the documents.
        steps[borders - start] = 1
        return np.cumsum(steps, dtype=np.int32)

    def documents(self, min_tokens: int = 1) -> Iterator[tuple[int, int, int]]:
        """Yield (doc_id, start, stop) of documents of at least `min_tokens` tokens, EOS included, in store order."""
        offsets = self.doc_offsets
        for doc_id in np.flatnonzero(np.diff(offsets) >= min_tokens):
            yield int(doc_id), int(offsets[doc_id]), int(offsets[doc_id + 1])

    def origin(self, doc_id: int) -> str:
        """Describe the origin of a document: source file and record (line, row or file number in it, from 1)."""
        shard = int(np.searchsorted(self._document_starts, doc_id, side="right")) - 1
        index = doc_id - int(self._document_starts[shard])
        (record,) = self._document_table(shard)[index : index + 1]
        source = self.manifest.sources[int(record["source"])]
        place = f" (from byte {source.start})" if source.start else ""
        if source.is_part:
            place = f" (part {source.start} of {source.stop})"
        return f"{source.path}{place}: record {int(record['record'])}"

    def place(self, doc_id: int) -> str:
        """Describe the origin of a document, or give its index if the store has no sources."""
        return self.origin(doc_id) if self.manifest.sources else f"document {doc_id}"

    def span(self, doc_id: int) -> tuple[int, int]:
        """Return (start, stop) of one document's tokens, EOS included, by a lookup in its shard's table."""
        shard = int(np.searchsorted(self._document_starts, doc_id, side="right")) - 1
        record = doc_id - int(self._document_starts[shard])
        start, stop = self._document_table(shard).span(record)
        base = int(self._token_starts[shard])
        return base + start, base + stop

    def text_hashes(self) -> np.ndarray:
        """Return uint64 [D]: a hash of each document's text; equal for equal texts, in any store."""
        hashes = [self._document_table(i)[:]["text_hash"] for i in range(len(self._shards))]
        return np.concatenate([np.empty(0, np.uint64), *hashes])

    def document_tables(self) -> Iterator[tuple[int, DocumentTable]]:
        """Yield (first doc_id, table) of each shard, in order; tables hold `DOCUMENT` records and read by slices."""
        for i, first_doc in enumerate(self._document_starts[:-1]):
            yield int(first_doc), self._document_table(i)

    def _borders(self, start: int, stop: int) -> np.ndarray:
        """Return the starts of documents strictly within the span."""
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            last = min(stop, end) - base
            parts.append(self._document_table(shard).stops_between(start - base, last) + base)
            # The end of a shard ends a document, but its table reports only ends strictly within.
            if base + last < stop:
                parts.append(np.array([end]))
            start, shard = base + last, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first, last): the part of a span of tokens that lies in each shard, in order."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.path}/{self.split_name}")
        # side="right" finds the shard that contains `start`: empty shards are filtered out, so starts are distinct.
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            yield shard, start - base, min(stop, end) - base
            start, shard = min(stop, end), shard + 1

    def _open_tokens(self, shard: int) -> TokenFile:
        vocab_size = self.manifest.tokenizer.vocab_size
        return TokenFile(self.path, self._file(shard, "tokens"), self._shards[shard], self.dtype, vocab_size)

    def _open_mask(self, shard: int) -> MaskFile:
        return MaskFile(self.path, self._file(shard, "mask"), self._shards[shard])

    def _open_documents(self, shard: int) -> DocumentTable:
        return DocumentTable(self.path, self._file(shard, "documents"), self._shards[shard])

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / self.split_name / f"{self._shards[shard].name}.{suffix}"

    def _check_files(self) -> None:
        for i, shard in enumerate(self._shards):
            check_sizes(self.path, self._file(i, "tokens"), shard, self.dtype)
            load_document_index(self.path, self._file(i, "documents"), shard)


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
