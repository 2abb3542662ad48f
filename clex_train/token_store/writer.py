"""Write the files of a token store: shards document by document, then the manifest.

Each file is written under a temporary name, flushed to disk and renamed, so a final name always means a whole file.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from clex_train.token_store.manifest import (
    BLOCK,
    BLOCK_SUM,
    DOCUMENT,
    MANIFEST,
    MASKED_VERSION,
    SPLITS,
    VERSION,
    Manifest,
    Shard,
    TokenizerInfo,
    partial_path,
    token_dtype,
)
from clex_train.token_store.vocabulary import vocabulary_sha256
from clex_train.utils.files import publish, sync_directory, sync_tree, temporary_path, write_atomically

_TABLE_ROWS = 4096
"""Document records to buffer before a write; 28 bytes each."""


class ShardWriter:
    """Writes `<folder>/<name>.tokens` and `.documents`; a context manager that removes them on an error.

    A document is any number of `write` calls and one `end_document`; its tokens are not kept in memory. With
    `has_mask`, each `write` says which of its tokens the loss counts.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, has_mask: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._dtype = folder, name, dtype
        self._largest = np.iinfo(dtype).max
        # Hash while writing: reading a shard of gigabytes again would double the time on a network file system.
        self._tokens = _HashedFile(self._path("tokens.tmp"))
        self._table = _HashedFile(self._path("documents.tmp"))
        self._mask = _BitFile(self._path("mask.tmp")) if has_mask else None
        self._documents: list[tuple[int, int, int, int]] = []
        self.num_documents = self._num_tokens = 0

    def write(self, ids: np.ndarray, scored: np.ndarray | None = None) -> None:
        """Append ids [n], n >= 0, to the current document; the caller ends it with EOS. `scored` is its mask, bool."""
        if len(ids):
            # astype would wrap an id that is too large around to another valid id.
            assert 0 <= ids.min() <= ids.max() <= self._largest, "ids do not fit the dtype"
            content = ids.astype(self._dtype).tobytes()
            self._tokens.write(content)
            self._num_tokens += len(ids)
        if self._mask is not None:
            assert scored is not None, "a store with a mask has a bit for each token"
            assert len(scored) == len(ids), (len(scored), len(ids))
            self._mask.write(scored)

    def end_document(self, text_hash: int, source: int, record: int) -> None:
        """End the current document and record the fields of `DOCUMENT`."""
        self._documents.append((self._num_tokens, text_hash, source, record))
        self.num_documents += 1
        if len(self._documents) == _TABLE_ROWS:
            self._write_table()

    def add(self, ids: np.ndarray, text_hash: int, source: int, record: int) -> None:
        """Append a whole document, EOS included."""
        self.write(ids)
        self.end_document(text_hash, source, record)

    def close(self) -> Shard:
        """Flush all files to disk under their final names and describe the shard."""
        self._write_table()
        sums, mask, mask_sums = self._tokens.sums(), "", b""
        # The tokens first: an interruption in between leaves files that no manifest lists, which a retry overwrites.
        publish(self._tokens.file, self._path("tokens"))
        publish(self._table.file, self._path("documents"))
        write_atomically(self._path("blocks"), sums)
        if self._mask is not None:
            self._mask.flush()
            mask, mask_sums = self._mask.bytes.sha256.hexdigest(), self._mask.bytes.sums()
            publish(self._mask.bytes.file, self._path("mask"))
            write_atomically(self._path("mask_blocks"), mask_sums)
        return Shard(
            self._name,
            self.num_documents,
            self._num_tokens,
            self._tokens.sha256.hexdigest(),
            self._table.sha256.hexdigest(),
            hashlib.sha256(sums).hexdigest(),
            mask,
            hashlib.sha256(mask_sums).hexdigest() if mask else "",
        )

    def _write_table(self) -> None:
        self._table.write(np.array(self._documents, DOCUMENT).tobytes())
        self._documents = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._tokens, self._table, *([self._mask.bytes] if self._mask else [])):
            with suppress(OSError):  # on a full disk, closing fails to flush; the file is removed anyway
                part.file.close()
        for path in map(self._path, ("tokens.tmp", "documents.tmp", "mask.tmp")):
            path.unlink(missing_ok=True)
        for path in map(self._path, ("blocks", "mask_blocks")):
            temporary_path(path).unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._name}.{suffix}"


class _HashedFile:
    """File that is hashed while it is written, as a whole and by blocks."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by its owner
        self.sha256 = hashlib.sha256()
        self._blocks = _BlockSums()

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self._blocks.add(content)

    def sums(self) -> bytes:
        """Return the checksums of the blocks; nothing can be written afterwards."""
        return self._blocks.content()


class _BitFile:
    """File of bits, eight in a byte, the least significant first."""

    def __init__(self, path: Path) -> None:
        self.bytes = _HashedFile(path)
        self._rest = np.empty(0, np.bool_)

    def write(self, bits: np.ndarray) -> None:
        # A document may end within a byte; the bits of an unfinished byte wait for the next document.
        bits = np.concatenate([self._rest, bits.astype(np.bool_)])
        whole = len(bits) - len(bits) % 8
        self.bytes.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def flush(self) -> None:
        """Write the last byte, filled up with zeros."""
        self.bytes.write(np.packbits(self._rest, bitorder="little").tobytes())
        self._rest = self._rest[:0]


class _BlockSums:
    """CRC-32 of each `BLOCK` bytes of a file that is only appended to."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._running = self._filled = 0

    def add(self, content: bytes) -> None:
        # Slice a view: writes have any size, and copying them would double the memory traffic.
        view = memoryview(content)
        while len(view):
            part = view[: BLOCK - self._filled]
            self._running = zlib.crc32(part, self._running)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._end_block()

    def content(self) -> bytes:
        """Return the content of the `.blocks` file."""
        if self._filled:
            self._end_block()
        return np.array(self._sums, BLOCK_SUM).tobytes()

    def _end_block(self) -> None:
        self._sums.append(self._running)
        self._running = self._filled = 0


def move_store(partial: Path, store: Path) -> None:
    """Rename a complete `partial` directory to `store`, which must not exist."""
    # Sync the whole tree first: the tokenizer's files come from its library, which does not flush them, and a rename
    # may reach the disk before the content does.
    sync_tree(partial)
    os.rename(partial, store)
    sync_directory(store.parent)


def write_store(
    store: Path,
    documents: Mapping[str, Iterable[Sequence[int]]],
    vocab_size: int,
    eos_id: int = 0,
    masks: Mapping[str, Sequence[Sequence[bool]]] | None = None,
) -> Manifest:
    """Write a store from token lists in memory, appending EOS to each; for tests and synthetic benchmarks.

    Args:
        store: directory to create.
        documents: token ids without EOS, by split ("train", "validation"); a missing split is empty.
        vocab_size: exclusive upper bound of the ids; determines the dtype. Token `i` is named "i".
        eos_id: token to append to each document.
        masks: bits of each document's tokens, EOS included, by split; None for a store without a mask.
    """
    partial = partial_path(store)
    splits: dict[str, list[Shard]] = {}
    for split in SPLITS:
        with ShardWriter(partial / split, "00000", token_dtype(vocab_size), masks is not None) as writer:
            for record, ids in enumerate(documents.get(split, ()), start=1):
                content = np.array([*ids, eos_id], np.int64)
                digest = hashlib.blake2b(content.tobytes(), digest_size=8).digest()
                writer.write(content, None if masks is None else np.array(masks[split][record - 1], np.bool_))
                writer.end_document(int.from_bytes(digest, "little"), source=0, record=record)
            splits[split] = [writer.close()] if writer.num_documents else []
    vocabulary = {str(i): i for i in range(vocab_size)}
    tokenizer = TokenizerInfo(vocab_size, vocabulary_sha256(vocabulary), str(eos_id), eos_id)
    version = VERSION if masks is None else MASKED_VERSION
    manifest = Manifest(token_dtype(vocab_size).str, tokenizer, splits, version=version)
    write_atomically(partial / MANIFEST, manifest.to_json().encode())
    move_store(partial, store)
    return manifest
