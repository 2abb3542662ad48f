"""`decontaminate`: find evaluation documents that appear, whole or in part, in the training documents.

The index holds the n-grams of the evaluation side in memory, and the training documents stream past it once. Every pair
is compared exactly, in memory that does not grow with the training data; see `contamination.py` for the measures. The
report lists the findings; with `output=`, a store is written without the contaminated documents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from clex_train.token_store.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, RunStopped, renamed_key, require
from data_prep.config import DecontaminateVerb
from data_prep.decontaminate.contamination import Findings, Sketches, compare, in_batches, signature
from data_prep.decontaminate.decontaminated import require_writable, write_decontaminated
from data_prep.decontaminate.ngrams import NgramIndex, WordReader, build_index
from data_prep.decontaminate.report import Report, write_report
from data_prep.progress import Progress
from data_prep.workers import pool

logger = log.get(__name__)

CHUNK_TOKENS = 1 << 20
"""Training tokens per task of a worker."""
BATCH_WORDS = 1 << 17
"""Words per lookup in the index."""
BATCH_PAIRS = 1 << 20
"""Pairs of documents per lookup: the counts take 8 bytes each for every n-gram size."""
MAX_BATCH_DOCUMENTS = 256


def run(config: DecontaminateVerb) -> None:
    """Compare the stores, write the report and, with `output`, a store without the contaminated documents.

    Raises:
        InputError: a store or an output cannot be used; names the key.
        RunStopped: documents are contaminated and no output is given, or none would be left. The report is written.
    """
    train, evaluation = _open("train", config.train, "train"), _open("evaluation", config.evaluation.path, "validation")
    if config.output:
        require_writable(Path(config.output), config.overwrite, (train.path, evaluation.path))
    folder = Path(config.report or f"{(config.output or config.evaluation.path or '').rstrip('/')}.decontamination")
    # Before the scan, which may take hours.
    _create(folder)
    findings, wordless = scan(train, evaluation, config, folder)
    report = Report(train, evaluation, config, findings, wordless)
    write_report(report, folder)
    print(log.printable("\n".join(report.summary())))
    logger.info("the pairs are in %s", folder / "report.md")
    _conclude(report, folder, config)


def _conclude(report: Report, folder: Path, config: DecontaminateVerb) -> None:
    found, total = len(report.contaminated), report.evaluation.num_documents
    if found and (found == total or not config.output):
        remedy = "choose other evaluation documents" if found == total else "output=STORE writes a store without them"
        raise RunStopped(
            f"evaluation={report.evaluation.path}: {found} of {total} documents are contaminated by "
            f"train={config.train}, see {folder / 'report.md'}; {remedy}"
        )
    if config.output:
        write_decontaminated(report, Path(config.output), config.overwrite)
        logger.info("%s has the remaining %d documents of %s", config.output, total - found, report.evaluation.path)


def _open(key: str, path: str | None, split: str) -> TokenStore:
    # Optional in the schema, so that `--help` can show the defaults.
    require(bool(path), key, path, "name the directory of a token store")
    with renamed_key("data.path", key):
        return TokenStore(str(path)).split(split)


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").touch()
    except OSError as error:
        raise ConfigError("report", folder, f"cannot write there ({error.strerror}); choose another place") from error


def scan(
    train: TokenStore, evaluation: TokenStore, config: DecontaminateVerb, scratch: Path
) -> tuple[Findings, list[int]]:
    """Compare every evaluation document with every training document.

    Args:
        train, evaluation: the two splits.
        config: n-gram sizes, limits and number of workers.
        scratch: directory for the temporary index.

    Returns:
        the findings, and the evaluation documents without any word.
    """
    groups = list(_groups(evaluation, config))
    chunks = list(_chunks(train.doc_offsets))
    total = Findings()
    wordless: list[int] = []
    with Progress(len(groups) * train.num_tokens * train.dtype.itemsize, "decontaminate") as progress:
        for group in groups:
            with TemporaryDirectory(dir=scratch, prefix=".index_") as folder:
                wordless += _prepare(evaluation, group, config, Path(folder))
                found = Findings()
                # closing: on an error or Ctrl-C, the generator must end its worker processes at once.
                with closing(_in_order(_Task(train.path, Path(folder), config), chunks)) as results:
                    for part, num_bytes, num_tokens in results:
                        found.add(part)
                        progress.advance(num_tokens * train.dtype.itemsize, num_bytes, num_tokens)
            total.offending += [replace(p, evaluation_doc=group[p.evaluation_doc]) for p in found.offending]
            total.nearest |= {group[e]: replace(p, evaluation_doc=group[e]) for e, p in found.nearest.items()}
            # Each pass reads all training documents and counts the same ones: assign, do not add.
            total.wordless = found.wordless
    total.offending.sort(key=lambda pair: (pair.evaluation_doc, pair.train_doc))
    return total, wordless


def _groups(evaluation: TokenStore, config: DecontaminateVerb) -> Iterator[list[int]]:
    """Yield groups of evaluation documents whose index fits in memory."""
    # Tokens bound words from above. An n-gram takes 20 bytes (hash, owner, start), sorting one size 32 more.
    bytes_per_token = 20 * len(config.ngrams) + 40
    group: list[int] = []
    room = limit = config.index_mb * 1_000_000
    for doc_id, start, stop in evaluation.documents():
        needed = (stop - start) * bytes_per_token
        if group and needed > room:
            yield group
            group, room = [], limit
        group.append(doc_id)
        room -= needed
    yield group


def _prepare(evaluation: TokenStore, group: list[int], config: DecontaminateVerb, folder: Path) -> list[int]:
    """Write the index and the signatures of a group; return its documents without any word."""
    reader = WordReader(evaluation)
    words = [reader.words(doc_id) for doc_id in group]
    build_index(words, config.ngrams).save(folder)
    if config.minhash_threshold is not None:
        np.save(folder / "signatures.npy", [signature(w, config.shingle, config.permutations) for w in words])
    return [doc_id for doc_id, hashes in zip(group, words, strict=True) if not len(hashes)]


def _chunks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of training documents of about `CHUNK_TOKENS` tokens, independent of the number of workers."""
    first, last = 0, len(offsets) - 1
    while first < last:
        stop = int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop


@dataclass(frozen=True)
class _Task:
    """Compares a chunk of training documents with the index in `folder`; picklable, for worker processes."""

    train: Path
    folder: Path
    config: DecontaminateVerb

    def __call__(self, chunk: tuple[int, int]) -> tuple[Findings, int, int]:
        """Return the findings, the bytes of text and the tokens read."""
        reader, index, sketches = _opened(self.train, self.folder, self.config.minhash_threshold)
        findings = Findings()
        # A generator: the words of a chunk exist one batch at a time.
        documents = ((doc_id, reader.words(doc_id)) for doc_id in range(*chunk))
        most = max(1, min(MAX_BATCH_DOCUMENTS, BATCH_PAIRS // max(1, index.num_documents)))
        before = reader.num_bytes
        for batch in in_batches(documents, BATCH_WORDS, most):
            findings.add(compare(index, sketches, batch, self.config))
        offsets = reader.store.doc_offsets
        return findings, reader.num_bytes - before, int(offsets[chunk[1]] - offsets[chunk[0]])


@lru_cache(1)
def _opened(train: Path, folder: Path, minhash: float | None) -> tuple[WordReader, NgramIndex, Sketches | None]:
    """Open the stores and the index once per process, for all of its chunks."""
    index = NgramIndex.load(folder)
    sketches = None
    if minhash is not None:
        has_words = np.asarray(index.sizes.any(axis=1))
        sketches = Sketches(np.load(folder / "signatures.npy"), has_words, minhash)
    return WordReader(TokenStore(train)), index, sketches


def _in_order(task: _Task, chunks: list[tuple[int, int]]) -> Generator[tuple[Findings, int, int]]:
    """Yield the results in the order of the chunks, so that the report does not depend on timing."""
    workers = min(task.config.workers, len(chunks))
    if workers < 2:
        yield from map(task, chunks)
        # The index directory is about to be deleted, and the next group writes another to a new path.
        _opened.cache_clear()
        return
    with pool(workers, log.setup) as executor:
        try:
            yield from _results(executor, task, chunks, 2 * workers)
        except BrokenProcessPool as error:
            raise ConfigError(
                "workers",
                workers,
                "a worker was killed, most likely out of memory; use fewer workers, or a "
                f"smaller index_mb (now {task.config.index_mb})",
            ) from error


def _results(
    executor: ProcessPoolExecutor, task: _Task, chunks: list[tuple[int, int]], most: int
) -> Iterator[tuple[Findings, int, int]]:
    """Yield results in order with at most `most` of them pending: a slow first one would let the others pile up."""
    pending: deque[Future[tuple[Findings, int, int]]] = deque()
    # Submit ahead of the result that is awaited, so that workers never idle.
    for chunk in chunks:
        pending.append(executor.submit(task, chunk))
        if len(pending) >= most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
