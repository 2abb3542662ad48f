"""Read and verify the files of a shard: its document table when opened, its tokens block by block.

    <name>.tokens       token ids
    <name>.blocks       uint32 little endian: CRC-32 of each `BLOCK` bytes of the tokens, the last block shorter
    <name>.documents    one `DOCUMENT` record per document
    <name>.mask         one bit a token, and <name>.mask_blocks, its checksums; only in stores of conversations

Reads use `pread`, not a memory map: a map kills the process with SIGBUS if a file is truncated or its disk fails,
whereas a short read becomes one line of error. Stores of earlier versions have no `.blocks` and are read unverified.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from functools import cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from clex_train.token_store.manifest import BLOCK, BLOCK_SUM, DOCUMENT, Shard
from clex_train.utils.errors import InputError
from clex_train.utils.files import BadFile, open_regular, read_regular, regular_size

REMEDY = "copy the store again or tokenize again"
STRIDE = 128
"""Documents per entry of the in-memory index of a table."""
CHUNK = 1 << 16
"""Records of a table to verify at a time."""


class DamagedStore(InputError):
    """A file of a token store differs from its manifest or checksums; names the file, the place and the remedy."""


class CheckedFile:
    """Bytes of a shard's file; every read verifies the checksums of the blocks it touches.

    Args:
        store: directory of the store; a link that leads out of it is refused.
        path: the file.
        num_bytes: its size.
        sums: the file with its checksums.
        sums_sha256: hash of `sums`; empty for files of earlier versions, which are read unverified.

    Raises:
        DamagedStore: the file or its checksums are unreadable.
    """

    def __init__(self, store: Path, path: Path, num_bytes: int, sums: Path, sums_sha256: str) -> None:
        self._path, self._num_bytes = path, num_bytes
        self._file = _open(path, store)
        self._sums = _read_sums(sums, store, sums_sha256, num_blocks(num_bytes)) if sums_sha256 else None

    def read(self, first: int, last: int) -> memoryview:
        """Return bytes [first, last).

        Raises:
            DamagedStore: a checksum does not match, or the file is too short.
        """
        if self._sums is None:
            return memoryview(_pread(self._file, self._path, first, last))
        # Widen the read to whole blocks, the unit of the checksums.
        begin = first - first % BLOCK
        end = min(last + -last % BLOCK, self._num_bytes)
        content = memoryview(_pread(self._file, self._path, begin, end))
        for number, at in enumerate(range(0, len(content), BLOCK), begin // BLOCK):
            if zlib.crc32(content[at : at + BLOCK]) != self._sums[number]:
                raise DamagedStore(
                    f"{self._path}: damaged, block {number} (from byte {number * BLOCK}) fails its checksum; {REMEDY}"
                )
        return content[first - begin : last - begin]


class TokenFile:
    """Tokens of a shard; arguments and errors as `CheckedFile`.

    Args:
        store: directory of the store.
        path: the token file.
        shard: the manifest's entry, with sizes and checksums.
        dtype: uint16 or uint32.
        vocab_size: exclusive upper bound of the ids.
    """

    def __init__(self, store: Path, path: Path, shard: Shard, dtype: np.dtype, vocab_size: int) -> None:
        self._path, self._dtype, self._vocab_size = path, dtype, vocab_size
        num_bytes = shard.num_tokens * dtype.itemsize
        self._content = CheckedFile(store, path, num_bytes, path.with_suffix(".blocks"), shard.blocks_sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return token ids [stop - start], read-only.

        Raises:
            DamagedStore: a checksum does not match, the file is too short, or an id is outside the vocabulary.
        """
        size = self._dtype.itemsize
        ids = np.frombuffer(self._content.read(start * size, stop * size), self._dtype)
        self._require_known(ids, start)
        return ids

    def _require_known(self, ids: np.ndarray, start: int) -> None:
        # An id beyond the embedding is a device-side assert on CUDA, which names neither file nor token. A vocabulary
        # that fills the dtype (65,536 ids in uint16) has no such id.
        if self._vocab_size <= np.iinfo(self._dtype).max and len(ids) and ids.max() >= self._vocab_size:
            place = int((ids >= self._vocab_size).argmax())
            raise DamagedStore(
                f"{self._path}: damaged, token {start + place} has the id {ids[place]}, but the store's vocabulary "
                f"has {self._vocab_size} ids; {REMEDY}"
            )


class MaskFile:
    """Mask of a shard, one bit a token; arguments and errors as `TokenFile`."""

    def __init__(self, store: Path, path: Path, shard: Shard) -> None:
        sums = path.with_suffix(".mask_blocks")
        self._content = CheckedFile(store, path, mask_bytes(shard.num_tokens), sums, shard.mask_blocks_sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return bool [stop - start]: True where the loss counts the token."""
        first, last = start // 8, mask_bytes(stop)
        bits = np.unpackbits(np.frombuffer(self._content.read(first, last), np.uint8), bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(bool)


class DocumentTable:
    """`DOCUMENT` records of a shard, read by slices; verified as a whole when a process first opens it.

    Raises:
        DamagedStore: the checksum does not match, or the ends of the documents do not ascend to the last token.
    """

    def __init__(self, store: Path, path: Path, shard: Shard) -> None:
        self._path, self._num_documents = path, shard.num_documents
        self._file = _open(path, store)
        # The ends of every `STRIDE`-th document: bisecting them in memory leaves one short read instead of twenty.
        self._index = load_document_index(store, path, shard)

    def __len__(self) -> int:
        return self._num_documents

    def __getitem__(self, span: slice) -> np.ndarray:
        """Read the records of a slice of step 1."""
        first, last, _ = span.indices(len(self))
        size = DOCUMENT.itemsize
        return np.frombuffer(_pread(self._file, self._path, first * size, max(first, last) * size), DOCUMENT)

    def stops_between(self, low: int, high: int) -> np.ndarray:
        """Return int64 ends of documents strictly between two tokens of the shard, ascending."""
        first = int(np.searchsorted(self._index, low, side="right")) * STRIDE
        last = int(np.searchsorted(self._index, high, side="left")) * STRIDE + STRIDE
        stops = np.ascontiguousarray(self[first:last]["stop"])
        return stops[np.searchsorted(stops, low, side="right") : np.searchsorted(stops, high, side="left")]

    def span(self, record: int) -> tuple[int, int]:
        """Return (start, stop) of one document in the shard."""
        # A document begins where the previous one ends; the table stores ends only.
        stops = self[max(record - 1, 0) : record + 1]["stop"]
        return (int(stops[0]) if record else 0), int(stops[-1])


def check_sizes(store: Path, path: Path, shard: Shard, dtype: np.dtype) -> None:
    """Compare the sizes of a shard's files with the manifest; `path` is its token file. Raises `DamagedStore`."""
    num_bytes = shard.num_tokens * dtype.itemsize
    _check_size(path, store, num_bytes)
    _check_size(path.with_suffix(".documents"), store, shard.num_documents * DOCUMENT.itemsize)
    if shard.blocks_sha256:
        _check_size(path.with_suffix(".blocks"), store, num_blocks(num_bytes) * BLOCK_SUM.itemsize)
    if shard.mask_sha256:
        size = mask_bytes(shard.num_tokens)
        _check_size(path.with_suffix(".mask"), store, size)
        _check_size(path.with_suffix(".mask_blocks"), store, num_blocks(size) * BLOCK_SUM.itemsize)


def num_blocks(num_bytes: int) -> int:
    """Count the blocks of a file; the last one may be shorter."""
    return -(-num_bytes // BLOCK)


def mask_bytes(num_tokens: int) -> int:
    """Count the bytes that hold one bit a token."""
    return -(-num_tokens // 8)


def load_document_index(store: Path, path: Path, shard: Shard) -> np.ndarray:
    """Verify a document table and return the ends of documents `STRIDE - 1`, `2 * STRIDE - 1`, ..."""
    with _open(path, store) as file:
        # Inode, size and mtime key the cache: a file replaced while the process runs is verified again.
        facts = os.fstat(file.fileno())
    return _load_document_index(store, path, shard, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@cache
def _load_document_index(store: Path, path: Path, shard: Shard, *facts: int) -> np.ndarray:
    """Verify once per process and file: a run opens each store several times, and hashing a table takes seconds."""
    digest, before, index = hashlib.sha256(), 0, [np.empty(0, np.int64)]
    with _open(path, store) as file:
        for first in range(0, shard.num_documents, CHUNK):
            last = min(first + CHUNK, shard.num_documents)
            content = _pread(file, path, first * DOCUMENT.itemsize, last * DOCUMENT.itemsize)
            digest.update(content)
            stops = np.ascontiguousarray(np.frombuffer(content, DOCUMENT)["stop"])
            if (np.diff(stops, prepend=before) < 1).any():
                raise DamagedStore(f"{path}: damaged, the ends of its documents do not ascend; {REMEDY}")
            before = int(stops[-1])
            # A copy: a view would hold the whole table in memory until the end.
            index.append(stops[STRIDE - 1 :: STRIDE].copy())
    if digest.hexdigest() != shard.documents_sha256:
        raise DamagedStore(f"{path}: damaged, its checksum is not that of the manifest; {REMEDY}")
    if before != shard.num_tokens:
        raise DamagedStore(f"{path}: its documents end at token {before}, the shard at {shard.num_tokens}; {REMEDY}")
    return np.concatenate(index)


def _read_sums(path: Path, store: Path, expected: str, count: int) -> np.ndarray:
    try:
        content = read_regular(path, store, most=count * BLOCK_SUM.itemsize)
    except (BadFile, FileNotFoundError) as error:
        raise _unreadable(path, error) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise DamagedStore(f"{path}: damaged, its checksum is not that of the manifest; {REMEDY}")
    return np.frombuffer(content, BLOCK_SUM)


def _pread(file: BufferedReader, path: Path, first: int, last: int) -> bytes:
    """Read bytes [first, last) completely."""
    # Loop: Linux returns at most 2 GiB per call, and network file systems may return less.
    parts = []
    while first < last:
        try:
            part = os.pread(file.fileno(), last - first, first)
        except OSError as error:
            raise DamagedStore(f"{path}: cannot be read from byte {first} ({error.strerror}); {REMEDY}") from error
        if not part:
            size = os.fstat(file.fileno()).st_size
            raise DamagedStore(f"{path}: cut short, it has {size} bytes and is read up to byte {last}; {REMEDY}")
        parts.append(part)
        first += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _open(path: Path, store: Path) -> BufferedReader:
    try:
        return open_regular(path, within=store)
    except (BadFile, FileNotFoundError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BadFile | FileNotFoundError) -> DamagedStore:
    return DamagedStore(f"{path}: {error.reason if isinstance(error, BadFile) else 'is missing'}; {REMEDY}")


def _check_size(file: Path, store: Path, expected: int) -> None:
    try:
        size = regular_size(file, within=store)
    except (BadFile, FileNotFoundError) as error:
        raise _unreadable(file, error) from error
    if size != expected:
        raise DamagedStore(f"{file}: has {size} bytes instead of the {expected} in the manifest; {REMEDY}")
