"""Build the rows of a run from its config: open the stores, pack, shuffle and mix them, leave out skipped rows.

`describe` summarizes the result: rows, utilisation and cut documents of each store, mixture shares, epochs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from clex_train.config.data import DataConfig, Packing, parse_ranges
from clex_train.config.optim import OptimConfig
from clex_train.data import conversations
from clex_train.data.bos import describe_bos
from clex_train.data.concat_packing import ConcatRows
from clex_train.data.document_packing import best_fit, long_documents
from clex_train.data.mixture import MixedRows, Schedule
from clex_train.data.rows import Rows
from clex_train.data.sampler import ShuffledRows, SkippedRows
from clex_train.data.summary import PackingSummary
from clex_train.token_store.manifest import read_manifest
from clex_train.token_store.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, InputError, renamed_key

logger = log.get(__name__)

MANY_PASSES = 4
"""Epochs up to which repeated data is worth nearly as much as new data (Muennighoff et al., NeurIPS 2023)."""


class PackedRows(Rows, Protocol):
    """Rows of one pass over a store, which can summarize themselves."""

    def summary(self) -> PackingSummary:
        """Summarize rows, utilisation and cut documents."""
        ...


# Functions, not classes: adding a packing is one entry here and one in `Packing`.
PACKINGS: dict[Packing, Callable[[TokenStore, DataConfig], PackedRows]] = {
    Packing.concat: lambda store, data: ConcatRows(store, data.seq_len),
    Packing.best_fit: lambda store, data: best_fit(store, data.seq_len),
    Packing.long_documents: lambda store, data: long_documents(
        store, data.seq_len, data.min_document_tokens or data.seq_len
    ),
}

PACKING_LINES = {
    Packing.concat: "documents joined by EOS and cut every {seq_len:,} tokens",
    Packing.best_fit: "whole documents packed into rows of {seq_len:,} tokens, longer ones cut, rows padded",
    Packing.long_documents: "rows of {seq_len:,} tokens cut from documents of at least {shortest:,}",
}


def open_stores(data: DataConfig) -> dict[str, TokenStore]:
    """Open the store of each domain, by name; without domains, `data.path` under the name "".

    Raises:
        InputError: a store is missing or damaged, or two stores were tokenized differently.
    """
    if not data.domains:
        stores = {"": TokenStore(str(data.path))}
        _warn_without_checksums(stores)
        return stores
    stores = {name: _open_domain(name, str(domain.path)) for name, domain in data.domains.items()}
    _warn_without_checksums(stores)
    # Comparing with the first store is enough: the relation is transitive.
    first_name, first = next(iter(stores.items()))
    for name, store in stores.items():
        _check_same_tokenizer(f"data.domains.{name}", store, f"data.domains.{first_name}", first)
    return stores


def open_existing_stores(data: DataConfig) -> dict[str, TokenStore]:
    """Open only the stores that exist on this machine; a dry run may be on a login node without the data.

    Raises:
        InputError: a path exists and is not a token store.
    """
    paths = {name: domain.path for name, domain in data.domains.items()} or {"": data.path}
    here = {name: str(path) for name, path in paths.items() if path and Path(path).exists()}
    return {name: _open_domain(name, path) if name else TokenStore(path) for name, path in here.items()}


def _warn_without_checksums(stores: Mapping[str, TokenStore]) -> None:
    """Warn about stores of an earlier version, which only have checksums of whole files."""
    from clex_train.utils import distributed  # imported late: tokenizing alone needs no torch

    for store in stores.values():
        if not store.has_block_sums and distributed.is_main():
            logger.warning(
                "%s has no block checksums (an earlier version wrote it), so training cannot notice damaged tokens; "
                "check it once with `python -m data_prep inspect store=%s verify=true`, or tokenize again",
                store.path,
                store.path,
            )


def longest_document(store: TokenStore | None) -> int | None:
    """Return the tokens of the longest document of a split; None without a split."""
    return None if store is None else int(np.diff(store.doc_offsets).max(initial=0))


def fingerprint(stores: Mapping[str, TokenStore]) -> str:
    """Return the fingerprint of the store, or a hash over those of all domains and their names."""
    if "" in stores:
        return stores[""].fingerprint
    # Sorted, because the order of domains in a config does not change the data.
    content = sorted((name, store.fingerprint) for name, store in stores.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def pack(stores: Mapping[str, TokenStore], data: DataConfig) -> dict[str, PackedRows]:
    """Pack every store into rows.

    Raises:
        ConfigError: a store has too few tokens for one row, or no document that is long enough.
    """
    return {name: PACKINGS[data.packing](store, data) for name, store in stores.items()}


def build_rows(packed: Mapping[str, Rows], data: DataConfig, seed: int, batch_rows: int) -> Rows:
    """Return the endless row order of a run.

    Raises:
        ConfigError: `data.skip_rows` leaves no row.
    """
    order = mix(packed, data, seed, batch_rows)
    ranges = parse_ranges(data.skip_rows)
    # Skip after mixing: ranges count rows of the whole run, as the log and the fault search print them.
    return SkippedRows(order, ranges) if ranges else order


def describe(
    stores: Mapping[str, TokenStore],
    packed: Mapping[str, PackedRows],
    data: DataConfig,
    optim: OptimConfig,
    held_out: TokenStore | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (label, text) lines about the data of a run: stores, packing, mixture, held-out documents."""
    passes = count_epochs(packed, data, optim)
    for name, rows in packed.items():
        store = f"{name}: {data.domains[name].path}" if name else str(data.path)
        yield "data", f"{store}: {len(rows):,} sequences, {passes[name]:.3g} epochs"
        yield "begin", f"documents have {describe_bos(stores[name])}"
        yield "packing", f"{data.packing.value}: {rows.summary()}"
    yield from conversations.describe(stores)
    if data.domains:
        yield "mixture", mixture_line(data)
    if held_out is not None:
        count, longest = len(held_out.doc_offsets) - 1, longest_document(held_out)
        yield "held out", f"{held_out.path}: {count:,} documents of up to {longest:,} tokens"


def count_epochs(packed: Mapping[str, Rows], data: DataConfig, optim: OptimConfig) -> dict[str, float]:
    """Return the epochs over each store in a run."""
    total = optim.steps * optim.batch_rows
    counts = schedule(data, optim.batch_rows).counts(total) if data.domains else {"": total}
    return {name: counts[name] / len(rows) for name, rows in packed.items()}


def warn_about_repetition(packed: Mapping[str, Rows], data: DataConfig, optim: OptimConfig) -> None:
    """Warn about each store that a run reads for more than `MANY_PASSES` epochs."""
    for name, times in count_epochs(packed, data, optim).items():
        if times > MANY_PASSES:
            key = f"data.domains.{name}.weight" if name else "optim.steps"
            logger.warning(
                "%s is read for %.3g epochs, and beyond %d repetition teaches little: lower %s or add data",
                name or "the store",
                times,
                MANY_PASSES,
                key,
            )


def mix(packed: Mapping[str, Rows], data: DataConfig, seed: int, batch_rows: int) -> Rows:
    """Shuffle each domain on its own and interleave the domains by weight; without domains, shuffle the store."""
    if not data.domains:
        return ShuffledRows(packed[""], seed)
    # A stream per domain: adding or removing one leaves the order of the others unchanged.
    domains = {name: ShuffledRows(rows, seed, f"rows/{name}") for name, rows in packed.items()}
    return MixedRows(domains, schedule(data, batch_rows))


def schedule(data: DataConfig, batch_rows: int) -> Schedule:
    """Return the map from rows to domains; weights that change at step s apply from row s * batch_rows."""
    return Schedule({step * batch_rows: weights for step, weights in data.weights().items()})


def packing_line(data: DataConfig) -> str:
    """Describe the packing in one line."""
    words = PACKING_LINES[data.packing].format(seq_len=data.seq_len, shortest=data.min_document_tokens or data.seq_len)
    skipped = sum(stop - start for start, stop in parse_ranges(data.skip_rows))
    return f"{data.packing.value}: {words}" + (f"; {skipped:,} rows skipped" if skipped else "")


def mixture_line(data: DataConfig) -> str:
    """Describe the share of each domain, from each step at which the shares change."""
    phases = [(f"from step {step}: " if step else "") + _shares(weights) for step, weights in data.weights().items()]
    return "; ".join(phases)


def planned_epochs(data: DataConfig, optim: OptimConfig) -> str:
    """Estimate the epochs over each domain from the manifests alone, before any store is opened."""
    # The schedule is exact, so the plan and the run agree to the row.
    counts = schedule(data, optim.batch_rows).counts(optim.steps * optim.batch_rows)
    return ", ".join(f"{name} {_planned(data, name, rows)}" for name, rows in counts.items())


def _planned(data: DataConfig, name: str, num_rows: int) -> str:
    tokens = num_rows * data.seq_len
    try:
        available = read_manifest(Path(str(data.domains[name].path))).num_tokens("train")
    except InputError:
        return f"unknown ({tokens:,} tokens, no store at {data.domains[name].path})"
    # Padding and documents that are too short leave fewer usable tokens, so epochs only grow; concat reads every token.
    least = "" if data.packing is Packing.concat else "at least "
    return f"{least}{tokens / available:.3g} times" if available else "an empty store"


def _shares(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {100 * weight / total:.4g} %" for name, weight in weights.items())


def _open_domain(name: str, path: str) -> TokenStore:
    with renamed_key("data.path", f"data.domains.{name}.path"):
        return TokenStore(path)


def _check_same_tokenizer(key: str, store: TokenStore, first_key: str, first: TokenStore) -> None:
    ours, theirs = store.manifest.tokenizer, first.manifest.tokenizer
    if ours.eos_id != theirs.eos_id:
        raise ConfigError(
            f"{key}.path",
            store.path,
            f"documents end with {ours.eos_token!r}, those of {first_key} with "
            f"{theirs.eos_token!r}; tokenize both with one tokenizer",
        )
    # The template of conversations decides how they begin, whatever other documents have.
    if store.bos != first.bos and not store.manifest.is_masked and not first.manifest.is_masked:
        raise ConfigError(
            f"{key}.path",
            store.path,
            f"its documents have {describe_bos(store)}, those of "
            f"{first_key}.path={first.path} have {describe_bos(first)}; tokenize both with the same bos=",
        )
    if ours.vocabulary_sha256 != theirs.vocabulary_sha256:
        raise ConfigError(
            f"{key}.path",
            store.path,
            f"its tokenizer ({ours.vocab_size} tokens) is not that of {first_key}.path={first.path} "
            f"({theirs.vocab_size} tokens); tokenize all domains with one tokenizer",
        )
