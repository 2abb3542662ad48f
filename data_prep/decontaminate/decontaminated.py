"""Writes the store that `decontaminate` leaves: the evaluation's validation split without what was found."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from clex_train.data.manifest import SPLITS, TOKENIZER, Manifest, Shard
from clex_train.data.store import TokenStore
from clex_train.data.writer import ShardWriter
from clex_train.utils.errors import NO_ROOM
from data_prep.decontaminate.report import Report
from data_prep.partial import open_partial, publish, require_place_of_store

_COPIED_TOKENS = 1 << 22
_SHARD = "00000"


def require_writable(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise `ValueError` if `output` is one of the stores that are read, or exists and may not be replaced."""
    if output.resolve() in [store.resolve() for store in inputs]:
        raise ValueError(f"output={output}: a store that is read is not overwritten; choose another")
    if output.exists() and not overwrite:
        raise ValueError(f"output={output}: exists; choose another, or overwrite=true")
    require_place_of_store(output)


def write_decontaminated(report: Report, output: Path, overwrite: bool) -> None:
    """Write the store: same tokenizer and sources; the manifest's settings say what was left out, and why.

    Raises:
        ValueError: not writable, in use, or the disk is full.
    """
    store = report.evaluation
    settings: dict[str, object] = {
        "decontaminate": report.settings(),
        "left_out": report.left_out(),
        "decontaminated_store": store.manifest.settings,
    }
    try:
        with open_partial(output, settings, overwrite=True) as partial:
            shutil.copytree(store.tokenizer_path, partial / TOKENIZER, dirs_exist_ok=True)
            kept = np.setdiff1d(np.arange(store.num_documents), report.contaminated)
            shard = _copy(store, kept, partial / store.split_name)
            publish(partial, _manifest(store, shard, settings), output)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(
            f"output={output}: the disk is full; free some space and run the same command again"
        ) from error


def _copy(store: TokenStore, kept: np.ndarray, folder: Path) -> Shard:
    records = np.concatenate([table[:] for _, table in store.document_tables()])
    with ShardWriter(folder, _SHARD, store.dtype) as writer:
        for doc in map(int, kept):
            start, stop = (int(offset) for offset in store.doc_offsets[doc : doc + 2])
            for first in range(start, stop, _COPIED_TOKENS):
                writer.write(store.tokens(first, min(first + _COPIED_TOKENS, stop)))
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
