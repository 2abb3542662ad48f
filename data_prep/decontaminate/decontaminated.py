"""Write the decontaminated store: the validation split without the contaminated documents."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from clex_train.token_store.manifest import SPLITS, TOKENIZER, Manifest, Shard
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import ShardWriter
from clex_train.utils.errors import NO_ROOM, ConfigError
from data_prep.decontaminate.report import Report
from data_prep.resume import open_partial, publish, require_place_of_store

_COPIED_TOKENS = 1 << 22
"""Tokens to copy at a time, so that memory does not depend on the longest document."""
_SHARD = "00000"


def require_writable(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise `ConfigError` if `output` is one of the input stores, or exists and may not be replaced."""
    # resolve: the same store may be reached by a link or a relative path.
    if output.resolve() in [store.resolve() for store in inputs]:
        raise ConfigError("output", output, "is one of the input stores; choose another path")
    if output.exists() and not overwrite:
        raise ConfigError("output", output, "exists; choose another path, or set overwrite=true")
    require_place_of_store(output)


def write_decontaminated(report: Report, output: Path, overwrite: bool) -> None:
    """Write the store with the same tokenizer and sources; the manifest records the documents left out, and why.

    Raises:
        ConfigError: the output is not writable or in use, or the disk is full.
    """
    store = report.evaluation
    settings: dict[str, object] = {
        "decontaminate": report.settings(),
        "left_out": report.left_out(),
        "decontaminated_store": store.manifest.settings,
    }
    try:
        # overwrite: `require_writable` has already checked an existing output.
        with open_partial(output, settings, overwrite=True) as partial:
            shutil.copytree(store.tokenizer_path, partial / TOKENIZER, dirs_exist_ok=True)
            kept = np.setdiff1d(np.arange(store.num_documents), report.contaminated)
            shard = _copy(store, kept, partial / store.split_name)
            publish(partial, _manifest(store, shard, settings), output)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ConfigError(
            "output", output, "the disk is full; free some space and run the same command again"
        ) from error


def _copy(store: TokenStore, kept: np.ndarray, folder: Path) -> Shard:
    records = np.concatenate([table[:] for _, table in store.document_tables()])
    with ShardWriter(folder, _SHARD, store.dtype, store.manifest.is_masked) as writer:
        # By offset, not by shard: the copy has a single shard, the original may have several.
        for doc in map(int, kept):
            start, stop = (int(offset) for offset in store.doc_offsets[doc : doc + 2])
            for first in range(start, stop, _COPIED_TOKENS):
                last = min(first + _COPIED_TOKENS, stop)
                writer.write(store.tokens(first, last), store.scored(first, last))
            record = records[doc]
            writer.end_document(int(record["text_hash"]), int(record["source"]), int(record["record"]))
        return writer.close()


def _manifest(store: TokenStore, shard: Shard, settings: dict[str, object]) -> Manifest:
    return dataclasses.replace(
        store.manifest,
        splits={split: [shard] if split == store.split_name else [] for split in SPLITS},
        settings=settings,
        versions=store.manifest.versions | {"datasketch": version("datasketch")},
    )
