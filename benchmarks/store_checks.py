"""Section `checks` of bench_data.py: the cost of block checksums in reading, and of opening a store.

Reading: the loader over two stores of the same random tokens, one in the earlier format without checksums, in turns of
one process; shuffled rows from the page cache, processor time of the process including its reading thread.
Opening: processor time of a separate process that opens a store and reads one row; sparse tokens and a real document
table, from the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from data_loading import BATCH_ROWS, MICRO_BATCH, VOCABULARY

from clex_train.data.batch import collate_rows
from clex_train.data.concat_packing import ConcatRows
from clex_train.data.loader import batches
from clex_train.data.rows import Rows
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store.manifest import BLOCK, BLOCK_SUM, DOCUMENT, MANIFEST, Shard
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_atomically, write_store

SHARD_DOCUMENTS = 64_000
"""Number of documents of 1,000 tokens in a shard: 128 MB."""
MOST_ROWS, MOST_TOKENS = 20_000, 40_000_000
"""Limits of one turn."""
OPEN = """
import json, pathlib, sys, time
from clex_train.data.concat_packing import ConcatRows
from clex_train.token_store.store import TokenStore

def resident(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, start = resident("VmRSS"), time.process_time()
store = TokenStore(sys.argv[1])
opened = time.process_time()
ConcatRows(store, 4096)[0]
print(json.dumps([opened - start, time.process_time() - opened, resident("VmHWM") - before]))
"""


def checks(arguments: argparse.Namespace) -> list[str]:
    """Return the lines of the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench_checks_") as folder:
        lines = ["", "## Opening a store of documents of 1,000 tokens", ""]
        lines += [
            "| documents | tokens | shards | open, s | first row, s | memory, MiB |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        for count in arguments.documents:
            lines.append(opening(sparse_store(Path(folder) / f"{count}", count), arguments.repeats))
        lines += ["", "## Reading shuffled rows, million tokens a second of one core", ""]
        lines += ["| store | tokens in a row | without checksums | with | with over without, by turns |"]
        lines += ["|---|---:|---:|---:|---|"]
        dense = dense_store(Path(folder) / "dense", arguments.megabytes)
        for seq_len in (128, 4096, 32768):
            lines.append(reading(f"{arguments.megabytes} MB", dense, seq_len, arguments.repeats))
        for seq_len in (128, 4096, 32768):
            words = f"{arguments.documents[-1] * 1000:,} tokens, sparse"
            lines.append(reading(words, Path(folder) / f"{arguments.documents[-1]}", seq_len, arguments.repeats))
        return lines


def opening(store: Path, repeats: int) -> str:
    """Measure seconds and memory of a process that opens a store."""
    found = [_opened(store) for _ in range(repeats)]
    opened, first, memory = (statistics.median(column) for column in zip(*found, strict=True))
    whole = TokenStore(store)
    size = f"{whole.num_documents:,} | {whole.num_tokens:,} | {len(whole.shards)}"
    return f"| {size} | {opened:.2f} | {first:.3f} | {memory:.0f} |"


def reading(words: str, store: Path, seq_len: int, repeats: int) -> str:
    """Measure millions of tokens a second with and without checksums, in turns."""
    whole, plain = TokenStore(store), TokenStore(store)
    # The format of earlier versions.
    plain._shards = [dataclasses.replace(shard, blocks_sha256="") for shard in plain._shards]
    pairs = [[speed(ConcatRows(s, seq_len), turn) / 1e6 for s in (plain, whole)] for turn in range(repeats + 1)][1:]
    without, with_sums = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = ", ".join(f"{two / one:.2f}" for one, two in pairs)
    return f"| {words} | {seq_len:,} | {without:.1f} | {with_sums:.1f} | {ratios} |"


def speed(rows: Rows, turn: int) -> float:
    """Read steps of a shuffled order in one turn; return tokens per second of processor time."""
    steps = min(MOST_ROWS, MOST_TOKENS // rows.seq_len, len(rows)) // BATCH_ROWS
    start = time.process_time()
    for step in islice(batches(ShuffledRows(rows, turn), 0, BATCH_ROWS, 0, 1, MICRO_BATCH, collate_rows), steps):
        for _ in step:
            pass
    return steps * BATCH_ROWS * rows.seq_len / (time.process_time() - start)


def dense_store(store: Path, megabytes: int) -> Path:
    """Write random tokens in four shards."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, megabytes * 500_000, np.uint16)
    return _with_manifest(store, [_dense(store, f"{i:05}", part) for i, part in enumerate(np.array_split(tokens, 4))])


def sparse_store(store: Path, documents: int) -> Path:
    """Write tables and checksums of `documents` documents, with holes for their tokens."""
    firsts = range(0, documents, SHARD_DOCUMENTS)
    return _with_manifest(
        store, [_sparse(store, i, min(SHARD_DOCUMENTS, documents - at)) for i, at in enumerate(firsts)]
    )


def _opened(store: Path) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", OPEN, str(store)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _dense(store: Path, name: str, tokens: np.ndarray) -> Shard:
    """Write a shard of documents of 1,000 tokens."""
    content = tokens[: len(tokens) // 1000 * 1000].tobytes()
    (store / "train").mkdir(parents=True, exist_ok=True)
    (store / "train" / f"{name}.tokens").write_bytes(content)
    sums = [zlib.crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
    return _described(store, name, len(content) // 2000, np.array(sums, BLOCK_SUM))


def _sparse(store: Path, index: int, documents: int) -> Shard:
    """Make a shard whose tokens are a hole."""
    name, size = f"{index:05}", documents * 2000
    (store / "train").mkdir(parents=True, exist_ok=True)
    (store / "train" / f"{name}.tokens").touch()
    os.truncate(store / "train" / f"{name}.tokens", size)
    sums = np.full(-(-size // BLOCK), zlib.crc32(bytes(BLOCK)), BLOCK_SUM)
    sums[-1] = zlib.crc32(bytes(size - (len(sums) - 1) * BLOCK))
    return _described(store, name, documents, sums)


def _described(store: Path, name: str, documents: int, sums: np.ndarray) -> Shard:
    table = np.zeros(documents, DOCUMENT)
    table["stop"] = np.arange(1, documents + 1) * 1000
    sha256 = []
    for suffix, content in (("documents", table.tobytes()), ("blocks", sums.tobytes())):
        (store / "train" / f"{name}.{suffix}").write_bytes(content)
        sha256.append(hashlib.sha256(content).hexdigest())
    return Shard(name, documents, documents * 1000, "0" * 64, *sha256)


def _with_manifest(store: Path, shards: list[Shard]) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_store(Path(folder) / "small", {"train": [[1]]}, vocab_size=VOCABULARY)
    whole = dataclasses.replace(manifest, splits={"train": shards, "validation": []})
    write_atomically(store / MANIFEST, whole.to_json())
    return store
