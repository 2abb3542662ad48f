"""`evaluation_sets`: for each length, write a store of the held-out documents with at least that many tokens.

`<output>/<length>` is a token store with only a validation split, which evaluation reads like any other. EOS counts as
a token of the document, as in the windows of evaluation (clex_train/evaluation/windows.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from clex_train.token_store.manifest import DOCUMENT, TOKENIZER, Manifest, Shard, Source
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import ShardWriter
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, renamed_key, require
from data_prep.config import EvaluationSetsVerb
from data_prep.resume import disk_full_explained, is_done, open_partial, publish

logger = log.get(__name__)

CHUNK_TOKENS = 1 << 20
"""Tokens to copy at a time, so that memory does not depend on the longest document."""


def run(config: EvaluationSetsVerb) -> None:
    """Write the sets that do not exist yet.

    Raises:
        InputError: there is no store, no held-out document is as long as one of the lengths (then nothing is written),
            or an output has other content.
    """
    require(config.store is not None, "store", config.store, "name the directory of a token store: store=corpora/books")
    require(config.output is not None, "output", config.output, "name the directory to write the sets in")
    store = _held_out(str(config.store))
    lengths = sorted(set(config.lengths))
    _require_documents(store, lengths)
    # Check all outputs before writing any: a conflict must not surface after hours of copying.
    requests = {Path(str(config.output)) / str(length): _settings(store, length, config) for length in lengths}
    done = {output: is_done(output, settings, config.overwrite) for output, settings in requests.items()}
    for output, settings in requests.items():
        if done[output]:
            logger.info("%s already has this set", output)
            continue
        with disk_full_explained(output), open_partial(output, settings, config.overwrite) as partial:
            publish(partial, _write(store, settings, partial), output)
        logger.info("%s: %s", output, _counts(store, settings, TokenStore(output, "validation")))


def choose(store: TokenStore, min_tokens: int, max_documents: int | None) -> np.ndarray:
    """Choose at most `max_documents` documents of at least `min_tokens` tokens, EOS included: int64, ascending."""
    documents = np.flatnonzero(np.diff(store.doc_offsets) >= min_tokens)
    if max_documents is None or len(documents) <= max_documents:
        return documents
    # Smallest text hashes first: a larger `max_documents` keeps the documents of a smaller one, in any store order.
    by_hash = np.argsort(store.text_hashes()[documents], kind="stable")
    return np.sort(documents[by_hash[:max_documents]])


def _held_out(path: str) -> TokenStore:
    with renamed_key("data.path", "store"):
        return TokenStore(path).split("validation")


def _require_documents(store: TokenStore, lengths: list[int]) -> None:
    """Raise `ConfigError` before anything is written if a length has no document."""
    document_lens = np.diff(store.doc_offsets)
    # split("validation") refuses an empty split, so max() has an argument.
    longest = int(document_lens.max())
    missing = [length for length in lengths if length > longest]
    if missing:
        others = [length for length in lengths if length <= longest]
        remedy = f"use lengths={others}" if others else f"use lengths of at most {longest}"
        raise ConfigError(
            "lengths",
            missing,
            f"none of the {len(document_lens)} validation documents of {store.path} has that many "
            f"tokens (the longest has {longest}, EOS included); {remedy}, or use another store",
        )


def _settings(store: TokenStore, length: int, config: EvaluationSetsVerb) -> dict[str, Any]:
    return {
        "evaluation_set": {
            "store_fingerprint": store.fingerprint,
            "split": store.split_name,
            "min_tokens": length,
            "max_documents": config.max_documents,
        }
    }


def _write(store: TokenStore, settings: dict[str, Any], partial: Path) -> Manifest:
    request = settings["evaluation_set"]
    documents = choose(store, request["min_tokens"], request["max_documents"])
    records = _records(store, documents)
    used = np.unique(records["source"])
    # Synthetic stores have no tokenizer directory.
    if store.tokenizer_path.is_dir():
        shutil.copytree(store.tokenizer_path, partial / TOKENIZER, dirs_exist_ok=True)
    shard = _copy(store, documents, records, used, partial)
    return dataclasses.replace(
        store.manifest,
        splits={"train": [], store.split_name: [shard]},
        sources=_sources(store, records, used),
        settings=settings,
    )


def _copy(store: TokenStore, documents: np.ndarray, records: np.ndarray, used: np.ndarray, partial: Path) -> Shard:
    """Write the documents as one shard, with sources renumbered from 0 among those in `used`."""
    # `used` is sorted and contains every source, so the position is the new number.
    sources = np.searchsorted(used, records["source"])
    with ShardWriter(partial / store.split_name, "00000", store.dtype, store.manifest.is_masked) as writer:
        for document, record, source in zip(documents, records, sources, strict=True):
            start, stop = map(int, store.doc_offsets[document : document + 2])
            for first in range(start, stop, CHUNK_TOKENS):
                last = min(first + CHUNK_TOKENS, stop)
                writer.write(store.tokens(first, last), store.scored(first, last))
            writer.end_document(int(record["text_hash"]), int(source), int(record["record"]))
        return writer.close()


def _records(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Return the `DOCUMENT` records [n] of the documents, ascending, from the table of each shard."""
    parts = [np.empty(0, DOCUMENT)]
    for first, table in store.document_tables():
        inside = documents[(documents >= first) & (documents < first + len(table))]
        parts.append(table[:][inside - first])
    return np.concatenate(parts)


def _sources(store: TokenStore, records: np.ndarray, used: np.ndarray) -> list[Source]:
    """List the sources that the documents come from, with the number of documents of this set."""
    if not store.manifest.sources:
        return []
    counts = Counter(records["source"].tolist())
    return [
        dataclasses.replace(store.manifest.sources[source], counts={"documents": counts[source]})
        for source in used.tolist()
    ]


def _counts(store: TokenStore, settings: dict[str, Any], written: TokenStore) -> str:
    min_tokens = settings["evaluation_set"]["min_tokens"]
    long_enough = int((np.diff(store.doc_offsets) >= min_tokens).sum())
    return (
        f"{written.num_documents:,} of the {long_enough:,} validation documents of at least {min_tokens:,} tokens "
        f"({store.num_documents:,} of any length), {written.num_tokens:,} tokens"
    )
