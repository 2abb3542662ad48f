"""`inspect`: what a token store holds: counts, document lengths, the beginnings of some documents, its checksums."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from clex_train.data.manifest import SPLITS
from clex_train.data.store import TokenStore
from clex_train.seeding import generator
from clex_train.settings.bounds import require
from data_prep.config import InspectVerb

_BAR = 40


def run(config: InspectVerb) -> None:
    """Print the report.

    Raises:
        ValueError: `path` is not a complete store, or `verify` found a damaged file.
    """
    require(config.path is not None, "path", config.path, "name the directory of a token store: path=corpora/stdlib")
    store = TokenStore(str(config.path))
    print("\n".join(_summary(store)))
    for split in SPLITS:
        view = TokenStore(store.path, split)
        if view.num_documents:
            print("\n".join(["", f"{split}: document lengths in tokens", *length_histogram(view)]))
            print("\n".join(_samples(view, config.samples, config.sample_tokens)))
    if config.verify:
        print(f"\n{verify(store)} files verified, every checksum is that of the manifest")


def verify(store: TokenStore) -> int:
    """Read every file of a store and compare its sha256 with the manifest; returns how many there are.

    Raises:
        ValueError: a file differs; the first such is named.
    """
    expected = {store.tokenizer_path / name: digest for name, digest in store.manifest.tokenizer.files.items()}
    for split in SPLITS:
        for shard in store.manifest.splits[split]:
            expected[store.path / split / f"{shard.name}.tokens"] = shard.tokens_sha256
            expected[store.path / split / f"{shard.name}.documents"] = shard.documents_sha256
    for file, digest in expected.items():
        if not file.is_file() or _sha256(file) != digest:
            raise ValueError(
                f"{file}: damaged, its checksum is not that of the manifest; copy it again or tokenise again"
            )
    return len(expected)


def length_histogram(store: TokenStore) -> list[str]:
    """Lines of a histogram of document lengths, a class for every doubling, with the tokens in each."""
    lengths = np.diff(store.doc_offsets)
    classes = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(classes)
    tokens = np.bincount(classes, weights=lengths)
    lines = []
    for power in range(int(classes.min()), len(counts)):
        bar = "#" * round(_BAR * counts[power] / counts.max())
        lines.append(f"  {1 << power:>10,}  {counts[power]:>9,} documents {int(tokens[power]):>15,} tokens  {bar}")
    return lines


def _summary(store: TokenStore) -> list[str]:
    manifest, tokenizer = store.manifest, store.manifest.tokenizer
    counts = Counter[str]()
    for source in manifest.sources:
        counts.update(source.counts)
    lines = [
        f"{store.path}: token store, format version {manifest.version}, {store.dtype.name}",
        f"  fingerprint  {store.fingerprint}",
        f"  tokenizer    {tokenizer.vocab_size} tokens, EOS {tokenizer.eos_token!r} = {tokenizer.eos_id}",
        f"  sources      {len(manifest.sources)} ({', '.join(f'{v} {k}' for k, v in sorted(counts.items()))})",
        f"  split        {manifest.split_rule.get('validation_share')} held out by {manifest.split_rule.get('value')}",
    ]
    for split in SPLITS:
        size = f"{manifest.num_documents(split):,} documents, {manifest.num_tokens(split):,} tokens"
        lines.append(f"  {split:<12} {size}, {len(manifest.splits[split])} shards")
    return lines


def _samples(store: TokenStore, count: int, num_tokens: int) -> list[str]:
    from transformers import AutoTokenizer

    if not count:
        return []
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    chosen = generator(0, "inspect").permutation(store.num_documents)[:count]
    lines = []
    for doc_id in sorted(map(int, chosen)):
        start, stop = store.doc_offsets[doc_id : doc_id + 2]
        text = tokenizer.decode(store.tokens(int(start), min(int(start) + num_tokens, int(stop))).tolist())
        lines.append(f"  document {doc_id} ({stop - start:,} tokens, {store.origin(doc_id)})\n    {text!r}")
    return lines


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
