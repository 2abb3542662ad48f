"""Section `loading` of bench_data.py: rows from the page cache, a store of 10^10 tokens, and the index of best_fit.

Tokens are random (no time depends on them), document lengths log-normal. Loader times are processor times of the whole
process, including its reading thread, as medians over turns; the large stores are sparse files with a real document
table. The time to a first row includes opening the store; that of a resume runs from building the order to the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from clex_train.data.batch import Collate, collate_documents, collate_rows
from clex_train.data.concat_packing import ConcatRows
from clex_train.data.document_packing import best_fit
from clex_train.data.loader import batches
from clex_train.data.rows import Rows
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store.manifest import DOCUMENT, MANIFEST
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_atomically, write_store

BATCH_ROWS, MICRO_BATCH, VOCABULARY = 64, 8, 8192


def loading(arguments: argparse.Namespace) -> list[str]:
    """Return the lines of the page: loader speed, a store of 10^10 tokens, the index of best_fit."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench_loading_") as folder:
        small, large, billion = (Path(folder) / name for name in ("small", "large", "billion"))
        lines = speeds(small, arguments.repeats)
        lines += large_store(sparse_store(large, np.full(10**6, 10**4)), arguments.repeats)
        lengths = document_lengths(10**9)
        return lines + index_of_best_fit(sparse_store(billion, lengths), arguments.repeats)


def speeds(path: Path, repeats: int) -> list[str]:
    """Format a table of millions of tokens per second of one core."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, VOCABULARY, n).tolist() for n in document_lengths(20_000_000)]
    write_store(path, {"train": documents}, vocab_size=VOCABULARY)
    store = TokenStore(path)
    lines = ["", "## Loader from page cache, million tokens a second of one core", ""]
    lines += ["| packing | tokens in a row | documents joined | documents kept apart |", "|---|---:|---:|---:|"]
    for seq_len in (128, 4096, 32768):
        for name, rows in (("concat", ConcatRows(store, seq_len)), ("best_fit", best_fit(store, seq_len))):
            cells = [f"{speed(rows, collate, repeats) / 1e6:.1f}" for collate in (collate_rows, collate_documents)]
            lines.append(f"| {name} | {seq_len:,} | {' | '.join(cells)} |")
    return lines


def speed(rows: Rows, collate: Collate, repeats: int) -> float:
    """Return the median tokens per second of processor time."""
    steps = max(1, min(len(rows), 20_000) // BATCH_ROWS)
    found = []
    for turn in range(repeats + 1):
        start = time.process_time()
        for step in islice(batches(ShuffledRows(rows, turn), 0, BATCH_ROWS, 0, 1, MICRO_BATCH, collate), steps):
            for _ in step:
                pass
        # One more step has been prefetched, completely or partly; its tokens do not count.
        found.append(steps * BATCH_ROWS * rows.seq_len / (time.process_time() - start))
    return statistics.median(found[1:])


def large_store(path: Path, repeats: int) -> list[str]:
    """Time the first batch and the batch at row 10^7, in milliseconds."""
    lines = ["", "## A store of 10^10 tokens, a sparse file, rows of 128 tokens", ""]
    for words, first_row in (("open and read the first row", 0), ("the same, resumed at row 10^7", 10**7)):
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            rows = ShuffledRows(ConcatRows(TokenStore(path), 128), seed=0)
            next(next(batches(rows, first_row, 8, 0, 1, 8, collate_rows)))
            found.append(1000 * (time.perf_counter() - start))
        lines.append(f"- {words}: {statistics.median(found):.1f} ms (the slowest of {repeats}: {max(found):.1f})")
    return lines


def index_of_best_fit(path: Path, repeats: int) -> list[str]:
    """Time the construction of the index, and report its utilisation."""
    store = TokenStore(path)
    size = f"{store.num_documents:,} documents, {store.num_tokens:,} tokens"
    lines = ["", f"## Index of best_fit, {size}", "", "| tokens in a row | seconds | |", "|---:|---:|---|"]
    for seq_len in (4096, 32768):
        found = []
        for _ in range(repeats):
            start = time.process_time()
            rows = best_fit(TokenStore(path), seq_len)
            found.append(time.process_time() - start)
        lines.append(f"| {seq_len:,} | {statistics.median(found):.2f} | {rows.summary()} |")
    return lines


def document_lengths(total: int) -> np.ndarray:
    """Draw log-normal lengths with median 400 and mean about 1,000 tokens that sum to about `total`."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.35, total // 1000).astype(np.int64) + 1
    return np.minimum(lengths, 1_000_000)


def sparse_store(path: Path, lengths: np.ndarray) -> Path:
    """Write a store with a real document table, a sparse file for tokens and no checksums."""
    manifest = write_store(path, {"train": [[1]]}, vocab_size=VOCABULARY)
    table = np.zeros(len(lengths), DOCUMENT)
    table["stop"] = np.cumsum(lengths)
    total = int(lengths.sum())
    (path / "train" / "00000.documents").write_bytes(table.tobytes())
    os.truncate(path / "train" / "00000.tokens", total * 2)
    shard = dataclasses.replace(
        manifest.splits["train"][0],
        num_documents=len(lengths),
        num_tokens=total,
        documents_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
        blocks_sha256="",
    )
    changed = dataclasses.replace(manifest, splits={**manifest.splits, "train": [shard]})
    write_atomically(path / MANIFEST, changed.to_json().encode())
    return path
