"""On-disk format of a token store, and its manifest.

    <store>/manifest.json            written last: a directory without it is not a store
            tokenizer/               copy of the tokenizer's files, so that training needs no other path
            train/00000.tokens       token ids, uint16 or uint32 little endian; each document ends with EOS, and
                                     begins with BOS if `bos` is set
            train/00000.documents    one `DOCUMENT` record per document
            train/00000.blocks       CRC-32 of each `BLOCK` bytes of the tokens; missing in stores of earlier versions
            train/00000.mask         one bit a token, 1 where the loss counts it (least significant bit first); only in
            train/00000.mask_blocks  stores of conversations, with checksums as those of the tokens
            validation/...           the same for the held-out documents

Shards follow each other in manifest order; a reader sees one long sequence of tokens per split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from clex_train.utils.errors import ConfigError
from clex_train.utils.files import BadFile, is_plain_name
from clex_train.utils.records import Count, decode, read_json

FORMAT = "clex-token-store"
VERSION = 1
MASKED_VERSION = 2
"""Version of stores with a mask: an earlier program, which would train on every token, refuses it."""
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

DOCUMENT = np.dtype([("stop", "<i8"), ("text_hash", "<u8"), ("source", "<i4"), ("record", "<i8")])
"""Record of a document: its end in the shard's tokens (EOS included), the hash of its text, its source (index into
`Manifest.sources`) and its record in that source (line or row, counted from 1)."""

BLOCK = 1 << 14
"""Bytes of a token file per checksum: reading a row of 4,096 ids touches one or two blocks."""
BLOCK_SUM = np.dtype("<u4")
LARGEST = 2**28
"""Largest manifest to read, in bytes; a source file takes about 400 bytes of it."""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made a store."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**32)]
    vocabulary_sha256: str
    eos_token: str
    eos_id: Count
    bos_token: str | None = None
    bos_id: Count | None = None
    adds_bos: bool | None = None
    """True if the tokenizer prepends BOS by default; None in stores without a record of it."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file under `tokenizer/`."""


@dataclass(frozen=True)
class Source:
    """Part of the corpus: bytes [start, stop) of a file, or part `start` of `stop` of a streamed data set."""

    path: str
    start: Count
    stop: Count
    sha256: str | None
    counts: dict[str, Count] = field(default_factory=dict)
    is_part: bool = False


@dataclass(frozen=True)
class Shard:
    """One shard of a store: sizes and checksums."""

    name: str
    num_documents: Count
    num_tokens: Count
    tokens_sha256: str
    documents_sha256: str
    blocks_sha256: str = ""
    """Hash of `.blocks`; empty in stores of earlier versions, which have no block checksums."""
    mask_sha256: str = ""
    """Hash of `.mask`; empty in stores without a mask, whose tokens all count in the loss."""
    mask_blocks_sha256: str = ""
    """Hash of `.mask_blocks`."""


@dataclass(frozen=True)
class Manifest:
    """Contents of the `manifest.json` of a token store."""

    dtype: str
    tokenizer: TokenizerInfo
    splits: dict[str, list[Shard]]
    bos: bool | None = None
    """True if every document begins with BOS; None in stores without a record of it, which have no BOS."""
    split_rule: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    @property
    def is_masked(self) -> bool:
        """True if a mask says which tokens the loss counts."""
        return self.version == MASKED_VERSION

    def num_tokens(self, split: str) -> int:
        """Count the tokens of a split, one EOS per document included."""
        return sum(shard.num_tokens for shard in self.splits[split])

    def num_documents(self, split: str) -> int:
        """Count the documents of a split."""
        return sum(shard.num_documents for shard in self.splits[split])

    def fingerprint(self) -> str:
        """Hash the content that training reads: tokens, their order and the vocabulary, not paths or versions."""
        shards = {split: [_content(shard) for shard in shards] for split, shards in self.splits.items()}
        content = [self.dtype, self.tokenizer.vocabulary_sha256, self.tokenizer.eos_id, shards]
        # Append only for stores with BOS: fingerprints of older stores, recorded in checkpoints, must not change.
        if self.bos:
            content.append(f"BOS {self.tokenizer.bos_id}")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Serialize to the text of manifest.json."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"
        # Python keeps non-UTF-8 bytes of file names as lone surrogates; as JSON escapes they survive the round trip.
        return text.encode("utf-8", "backslashreplace").decode()


def _content(shard: Shard) -> list[int | str]:
    # Block checksums are left out: a store keeps its fingerprint when they are added to it.
    content: list[int | str] = [shard.num_documents, shard.num_tokens, shard.tokens_sha256, shard.documents_sha256]
    # Appended only where there is one: fingerprints recorded in checkpoints of other stores must not change.
    return [*content, shard.mask_sha256] if shard.mask_sha256 else content


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and uint32 (little endian) that fits every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(store: Path) -> Manifest:
    """Read and check `<store>/manifest.json`.

    Raises:
        ConfigError: the directory is missing, not a store, half written, or of an unknown format version.
    """
    path = store / MANIFEST
    # lexists, so that a dangling link is reported as such instead of as a missing manifest.
    if not os.path.lexists(path):
        raise ConfigError("data.path", store, _why_not_a_store(store))
    try:
        content = read_json(path, within=store, most=LARGEST)
    except FileNotFoundError as error:
        raise ConfigError("data.path", store, "manifest.json is a broken link; copy the store again") from error
    except BadFile as error:
        what = f"manifest.json is not that of a token store: {error.reason}"
        raise ConfigError("data.path", store, f"{what}; copy it again or tokenize again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError("data.path", store, "manifest.json is not that of a token store; tokenize again")
    # Check the version before decoding: a newer format may have fields that this version would call damaged.
    if content.get("version") not in (VERSION, MASKED_VERSION):
        raise ConfigError(
            "data.path",
            store,
            f"store has format version {content.get('version')}, this program reads versions "
            f"{VERSION} and {MASKED_VERSION}; use the program that wrote it, or tokenize again",
        )
    try:
        return _checked(decode(content, Manifest, path), path)
    except BadFile as error:
        raise ConfigError("data.path", store, f"manifest.json is {error.reason}; tokenize again") from error


def partial_path(store: Path) -> Path:
    """Return the directory that a store is written to before it is complete and renamed."""
    # Next to the store, because a rename is atomic only within one file system.
    return store.with_name(store.name + ".partial")


def _why_not_a_store(store: Path) -> str:
    if partial_path(store).exists():
        return "writing it was interrupted; run the same `python -m data_prep` command again to finish it"
    if store.name.endswith(".partial"):
        return "this store is half written; run the same `python -m data_prep` command again to finish it"
    if not store.exists():
        return "no such directory; `python -m data_prep tokenize` writes one"
    if not store.is_dir():
        return "not a directory; name the directory that `python -m data_prep tokenize` wrote"
    return "not a token store (no manifest.json); name a directory that `python -m data_prep tokenize` wrote"


def _checked(manifest: Manifest, path: Path) -> Manifest:
    """Raise `BadFile` for damage that the field types cannot express."""
    if manifest.dtype not in ("<u2", "<u4"):
        raise BadFile(path, f"damaged (dtype {manifest.dtype!r})")
    if set(manifest.splits) != set(SPLITS):
        raise BadFile(path, f"damaged (its splits are {', '.join(sorted(manifest.splits)) or 'none'})")
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    # Names become paths. A manifest from elsewhere must not make a reader leave the store (../../etc/passwd).
    for name in [*names, *manifest.tokenizer.files]:
        if not is_plain_name(name):
            raise BadFile(path, f"damaged (it names {name!r}, which is no file of its folder)")
    if manifest.tokenizer.vocab_size > np.iinfo(manifest.dtype).max + 1:
        raise BadFile(path, f"damaged (its vocabulary does not fit the dtype {manifest.dtype})")
    for what, index in (("EOS", manifest.tokenizer.eos_id), ("BOS", manifest.tokenizer.bos_id)):
        if index is not None and index >= manifest.tokenizer.vocab_size:
            raise BadFile(path, f"damaged ({what} is {index}, the vocabulary has {manifest.tokenizer.vocab_size} ids)")
    every = [shard for shards in manifest.splits.values() for shard in shards]
    if any(shard.num_documents > shard.num_tokens for shard in every):
        raise BadFile(path, "damaged (a shard has more documents than tokens)")
    if any(bool(hashed) != manifest.is_masked for s in every for hashed in (s.mask_sha256, s.mask_blocks_sha256)):
        raise BadFile(path, "damaged (only some of its shards have a mask)")
    return manifest
