"""`tokenize`: raw text to a token store.

A shard per unit of work, each with a record of what it holds; when all are there, the manifest, and the store is
complete. A killed program leaves its finished shards behind: the same command does the missing ones only, and ends with
the same bytes, whatever the number of workers.
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

from clex_train import log
from clex_train.data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, read_manifest, token_dtype
from data_prep.config import CorpusConfig, EngineChoice, TokenizeVerb
from data_prep.cutting import Uncuttable, cutter, uncut
from data_prep.encoding import load_tokenizer, save_tokenizer
from data_prep.engines import choose
from data_prep.partial import disk_full_explained, is_done, open_partial, publish
from data_prep.progress import Progress
from data_prep.shards import Job, check_sources, load_result, run_units
from data_prep.sources import Unit, plan

logger = log.get(__name__)


def run(config: TokenizeVerb) -> None:
    """Write the store that `config` asks for, or what is missing of it.

    Raises:
        ValueError: the corpus, the tokenizer or the output cannot be used; the message names key or file, and remedy.
    """
    output = Path(config.output)
    units = plan(config.corpus, config.shard_mb * 1_000_000)
    tokenizer = load_tokenizer(config.tokenizer.path)
    settings = _settings(config, units, tokenizer.backend_tokenizer.to_str())
    if is_done(output, settings, config.overwrite):
        logger.info("%s holds this store already", output)
        return
    with disk_full_explained(output), open_partial(output, settings, config.overwrite) as partial:
        manifest = _complete(config, units, tokenizer, partial, settings)
        publish(partial, manifest, output)
    _report(manifest, output)


def _complete(
    config: TokenizeVerb, units: list[Unit], tokenizer: Any, partial: Path, settings: dict[str, Any]
) -> Manifest:
    if (partial / MANIFEST).is_file():
        return read_manifest(partial)
    finished = {unit: result for unit in units if (result := load_result(partial, unit))}
    for unit, result in finished.items():
        check_sources(unit, result)
    job = _job(config, tokenizer, partial)
    todo = [unit for unit in units if unit not in finished]
    if len(todo) < len(units):
        logger.info("%d of %d shards are there already", len(units) - len(todo), len(units))
    with Progress(sum(piece.num_bytes for unit in todo for piece in unit.pieces)) as progress:
        run_units(todo, job, config.workers, progress)
    return _manifest(partial, units, job, settings)


def _job(config: TokenizeVerb, tokenizer: Any, partial: Path) -> Job:
    content = tokenizer.backend_tokenizer.to_str()
    try:
        cut: Callable[[str], Iterator[tuple[str, bool]]] = cutter(content)
    except Uncuttable as error:
        name = config.tokenizer.path
        logger.warning("tokenizer=%s: %s; documents are encoded whole, memory grows with the longest", name, error)
        cut = uncut
    return Job(
        partial,
        config.corpus,
        save_tokenizer(tokenizer, partial / TOKENIZER),
        cut,
        choose(config.tokenizer.engine, content),
        falls_back=config.tokenizer.engine is EngineChoice.auto,
    )


def _settings(config: TokenizeVerb, units: list[Unit], tokenizer_json: str) -> dict[str, Any]:
    """What the store's content depends on: requests of equal settings give equal stores."""
    corpus = {k: v.name if isinstance(v, Enum) else v for k, v in dataclasses.asdict(config.corpus).items()}
    files = json.dumps([dataclasses.asdict(unit) for unit in units])
    return {
        "corpus": corpus,
        "shard_mb": config.shard_mb,
        "files_and_sizes_sha256": hashlib.sha256(files.encode()).hexdigest(),
        "tokenizer_json_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
    }


def _manifest(partial: Path, units: list[Unit], job: Job, settings: dict[str, Any]) -> Manifest:
    results = [result for unit in units if (result := load_result(partial, unit))]
    assert len(results) == len(units), "every unit has a record by now"
    manifest = Manifest(
        dtype=token_dtype(job.tokenizer.vocab_size).str,
        tokenizer=job.tokenizer,
        splits={split: [r.shards[split] for r in results if split in r.shards] for split in SPLITS},
        split_rule=_split_rule(job.corpus),
        sources=[source for result in results for source in result.sources],
        settings=settings,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("tokenizers", "transformers", *{r.engine for r in results})},
    )
    if sum(manifest.num_documents(split) for split in SPLITS) == 0:
        raise ValueError(
            f"corpus.name={job.corpus.name}: the corpus is empty, no record became a document ({_counts(manifest)})"
        )
    return manifest


def _split_rule(corpus: CorpusConfig) -> dict[str, Any]:
    return {
        "rule": "validation if the first 8 bytes of blake2b(value), little endian, are below validation_share * 2^64",
        "value": corpus.split_field or f"the text ({corpus.text_field})",
        "validation_share": corpus.validation_share,
    }


def _report(manifest: Manifest, output: Path) -> None:
    for split in SPLITS:
        logger.info("%s: %d documents, %d tokens", split, manifest.num_documents(split), manifest.num_tokens(split))
    logger.info("%s is complete (%s)", output, _counts(manifest))
    if manifest.num_documents("validation") == 0 and manifest.split_rule["validation_share"] > 0:
        logger.warning(
            "no document fell into the validation split: evaluation needs some; raise corpus.validation_share=%s",
            manifest.split_rule["validation_share"],
        )


def _counts(manifest: Manifest) -> str:
    total = Counter[str]()
    for source in manifest.sources:
        total.update(source.counts)
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(total.items())) or "no records"
