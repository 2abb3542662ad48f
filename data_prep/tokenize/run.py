"""`tokenize`: turn raw text into a token store.

Each unit of work becomes a shard with a record of its content. When all shards exist, the manifest completes the store.
A killed program leaves its finished shards behind: the same command writes only the missing ones and ends with the same
bytes, for any number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clex_train.data.bos import resolve
from clex_train.token_store.manifest import (
    MANIFEST,
    MASKED_VERSION,
    SPLITS,
    TOKENIZER,
    VERSION,
    Manifest,
    read_manifest,
    token_dtype,
)
from clex_train.utils import log
from clex_train.utils.protocols import Tokenizer
from data_prep.chat.config import ChatVerb
from data_prep.config import CorpusConfig, EngineChoice, TokenizeVerb
from data_prep.corpus.documents import in_words, require_documents
from data_prep.corpus.held_out import LEAST, HeldOut, rule
from data_prep.corpus.sources import Unit, plan
from data_prep.progress import Progress
from data_prep.resume import disk_full_explained, is_done, open_partial, publish, require_place_of_store
from data_prep.tokenize.cutting import Uncuttable, cutter, uncut
from data_prep.tokenize.encoding import load_tokenizer, save_tokenizer
from data_prep.tokenize.engines import choose
from data_prep.tokenize.shards import Job, check_sources, load_result, run_units

logger = log.get(__name__)


def run(config: TokenizeVerb) -> None:
    """Write the store of a config, or the missing part of it.

    Raises:
        InputError: the corpus, the tokenizer or the output cannot be used; names the key or file, and the remedy.
    """
    output = Path(config.output)
    # Cheap checks first: the output, then the list of files, then the tokenizer, before any text is read.
    require_place_of_store(output)
    units = plan(config.corpus, config.shard_mb * 1_000_000)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.trust_remote_code)
    bos = resolve(config.bos, tokenizer, "bos")
    held_out = rule(config.corpus, units)
    settings = content_settings(config, units, tokenizer.backend_tokenizer.to_str(), bos, held_out)
    if is_done(output, settings, config.overwrite):
        logger.info("%s already is this store", output)
        return
    log_plan(config, units, len(tokenizer), bos)
    with disk_full_explained(output), open_partial(output, settings, config.overwrite) as partial:
        job = _job(config, tokenizer, partial, bos, held_out)
        manifest = complete(job, units, settings, config.workers)
        publish(partial, manifest, output)
    report(manifest, output)


def log_plan(config: TokenizeVerb, units: list[Unit], vocab_size: int, bos: bool) -> None:
    """Log input, tokenizer and output before the work begins."""
    paths = {piece.path for unit in units for piece in unit.pieces}
    megabytes = sum(piece.num_bytes for unit in units for piece in unit.pieces) / 1e6
    logger.info(
        "tokenize corpus %s (%.1f MB, files: %d) with %s (%d tokens), each document %s BOS, into %s",
        config.corpus.name,
        megabytes,
        len(paths),
        config.tokenizer.path,
        vocab_size,
        "with" if bos else "without",
        config.output,
    )


def complete(job: Job, units: list[Unit], settings: dict[str, Any], workers: int) -> Manifest:
    """Write the shards that are missing in `job.partial`, and return the manifest of all.

    Raises:
        InputError: bad input, or a file that changed since its shard was written.
    """
    partial = job.partial
    # The program was killed between writing the manifest and renaming the store.
    if (partial / MANIFEST).is_file():
        return read_manifest(partial)
    finished = {unit: result for unit in units if (result := load_result(partial, unit))}
    # Finished shards of changed files would mix two versions of a corpus in one store.
    for unit, result in finished.items():
        check_sources(unit, result)
    todo = [unit for unit in units if unit not in finished]
    if len(todo) < len(units):
        logger.info("%d of %d shards exist already", len(units) - len(todo), len(units))
    with Progress(sum(piece.num_bytes for unit in todo for piece in unit.pieces)) as progress:
        run_units(todo, job, workers, progress)
    return _manifest(partial, units, job, settings)


def _job(config: TokenizeVerb, tokenizer: Tokenizer, partial: Path, bos: bool, held_out: HeldOut) -> Job:
    content = tokenizer.backend_tokenizer.to_str()
    try:
        cut: Callable[[str], Iterator[tuple[str, bool]]] = cutter(content)
    except Uncuttable as error:
        name = config.tokenizer.path
        logger.warning("tokenizer=%s: %s; encoding documents whole, memory grows with the longest one", name, error)
        cut = uncut
    return Job(
        partial,
        config.corpus,
        save_tokenizer(tokenizer, partial / TOKENIZER),
        cut,
        choose(config.tokenizer.engine, content),
        falls_back=config.tokenizer.engine is EngineChoice.auto,
        bos=bos,
        below=held_out.below,
    )


def content_settings(
    config: TokenizeVerb | ChatVerb, units: list[Unit], tokenizer_json: str, bos: bool, held_out: HeldOut
) -> dict[str, Any]:
    """Record what determines the content of a store: equal settings give equal stores."""
    corpus = {k: v.name if isinstance(v, Enum) else v for k, v in dataclasses.asdict(config.corpus).items()}
    # By size, not checksum: hashing the corpus would read it twice. Changed files are found by `check_sources`.
    files = json.dumps([dataclasses.asdict(unit) for unit in units])
    return {
        "corpus": corpus,
        "shard_mb": config.shard_mb,
        "files_and_sizes_sha256": hashlib.sha256(files.encode()).hexdigest(),
        "tokenizer_json_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "bos": bos,
        # Only if raised: records of earlier versions lack the key and must compare equal.
        **({} if held_out.raised_to is None else {"held_out": dataclasses.asdict(held_out)}),
    }


def _manifest(partial: Path, units: list[Unit], job: Job, settings: dict[str, Any]) -> Manifest:
    # Read back from disk in the order of units: workers finish in any order, and earlier runs left some.
    results = [result for unit in units if (result := load_result(partial, unit))]
    assert len(results) == len(units), "every unit has a record by now"
    manifest = Manifest(
        dtype=token_dtype(job.tokenizer.vocab_size).str,
        tokenizer=job.tokenizer,
        bos=job.bos,
        splits={split: [r.shards[split] for r in results if split in r.shards] for split in SPLITS},
        split_rule=_split_rule(job.corpus) | ({"held_out": settings["held_out"]} if "held_out" in settings else {}),
        sources=[source for result in results for source in result.sources],
        settings=settings,
        version=VERSION if job.chat is None else MASKED_VERSION,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("tokenizers", "transformers", *{r.engine for r in results})},
    )
    # Only now: a filter may leave a single shard empty, but not the whole corpus.
    require_documents(job.corpus, _counts(manifest))
    return manifest


def _split_rule(corpus: CorpusConfig) -> dict[str, Any]:
    return {
        "rule": "validation if the first 8 bytes of blake2b(value), little endian, are below validation_share * 2^64",
        "value": corpus.split_field or f"the text ({corpus.text_field})",
        "validation_share": corpus.validation_share,
    }


def report(manifest: Manifest, output: Path) -> None:
    """Log the size of a complete store, and a split that differs from what was asked for."""
    for split in SPLITS:
        logger.info("%s: %d documents, %d tokens", split, manifest.num_documents(split), manifest.num_tokens(split))
    logger.info("%s is complete (%s)", output, in_words(_counts(manifest)))
    _report_split(manifest)


def _report_split(manifest: Manifest) -> None:
    """Log how many documents are held out, if that differs from the share or is too few."""
    share, found = manifest.split_rule["validation_share"], manifest.num_documents("validation")
    # A split of 0 is a choice of the user; anything below what error bars need is probably not.
    remedy = f"raise corpus.validation_share={share}, add documents, or cut long ones into several"
    if not share:
        return
    if found == 0:
        logger.warning("no document is held out, so this store cannot be used for evaluation: %s", remedy)
    elif found < LEAST:
        logger.warning("only 1 document is held out, too few for error bars: %s", remedy)
    elif "held_out" in manifest.split_rule:
        total = found + manifest.num_documents("train")
        words = "corpus.validation_share=%s of %d documents is too few for error bars: %d are held out"
        logger.info(words, share, total, found)


def _counts(manifest: Manifest) -> Counter[str]:
    total = Counter[str]()
    for source in manifest.sources:
        total.update(source.counts)
    return total
