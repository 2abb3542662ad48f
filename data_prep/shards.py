"""Tokenises units of work into shards, in this process or in several; a shard is a function of its unit alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from clex_train import log
from clex_train.data.manifest import SPLITS, TOKENIZER, Shard, Source, TokenizerInfo, token_dtype
from clex_train.data.writer import ShardWriter, write_atomically
from data_prep.config import CorpusConfig
from data_prep.documents import Document, documents
from data_prep.encoding import Encoder
from data_prep.progress import Progress
from data_prep.sources import Piece, Unit

UNITS = "units"
BATCH_BYTES = 4_000_000
BATCH_DOCUMENTS = 1024
_POLL_SECONDS = 0.2

Advance = Callable[[int, int, int], object]


@dataclass(frozen=True)
class Job:
    """What the units of a store have in common; `partial` is the directory it is written in."""

    partial: Path
    corpus: CorpusConfig
    tokenizer: TokenizerInfo


@dataclass(frozen=True)
class Result:
    """What became of a unit: its shards by split (none where no document fell) and the sources read."""

    shards: dict[str, Shard]
    sources: list[Source]


def run_units(units: list[Unit], job: Job, workers: int, progress: Progress) -> None:
    """Tokenise the units. After an error the finished ones are there all the same.

    Raises:
        ValueError: bad input, with its place; or a worker that was killed.
    """
    if workers == 1 or len(units) < 2:
        for unit in units:
            tokenize_unit(unit, job, progress.advance)
    else:
        _run_in_processes(units, job, min(workers, len(units)), progress)


def tokenize_unit(unit: Unit, job: Job, advance: Advance) -> None:
    """Write the shards of one unit, then the record that says so."""
    encoder = Encoder(job.partial / TOKENIZER, job.tokenizer)
    counts: list[Counter[str]] = [Counter() for _ in unit.pieces]
    with ExitStack() as stack:
        dtype = token_dtype(job.tokenizer.vocab_size)
        writers = {s: stack.enter_context(ShardWriter(job.partial / s, unit.name, dtype)) for s in SPLITS}
        for batch in _batches(_documents(unit, job.corpus, counts, advance)):
            encoded = encoder.encode([document.text for _, document in batch])
            for (source, document), ids in zip(batch, encoded, strict=True):
                writers[document.split].add(ids, document.text_hash, source, document.record)
            advance(0, sum(document.text_bytes for _, document in batch), sum(map(len, encoded)))
        shards = {split: writer.close() for split, writer in writers.items() if writer.num_documents}
    sources = [
        Source(p.path, p.start, p.stop, _sha256(p), dict(sorted(c.items())), is_part=p.format == "hub")
        for p, c in zip(unit.pieces, counts, strict=True)
    ]
    content = json.dumps(dataclasses.asdict(Result(shards, sources)))
    write_atomically(_result_path(job.partial, unit), content.encode())


def load_result(partial: Path, unit: Unit) -> Result | None:
    """The record of a finished unit, or None."""
    path = _result_path(partial, unit)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    shards = {split: Shard(**shard) for split, shard in content["shards"].items()}
    return Result(shards, [Source(**source) for source in content["sources"]])


def _documents(
    unit: Unit, corpus: CorpusConfig, counts: list[Counter[str]], advance: Advance
) -> Iterator[tuple[int, Document]]:
    """Yield (number of the source in the store, document) over all pieces of a unit, reporting the bytes read."""
    for i, piece in enumerate(unit.pieces):
        reported = 0
        for document in documents(piece, corpus, counts[i]):
            yield unit.first_source + i, document
            advance(document.consumed - reported, 0, 0)
            reported = document.consumed
        advance(piece.num_bytes - reported, 0, 0)


def _batches(items: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Batches that are worth the tokenizer's threads and bounded in memory, unless one document is larger."""
    batch: list[tuple[int, Document]] = []
    num_bytes = 0
    for item in items:
        batch.append(item)
        num_bytes += item[1].text_bytes
        if num_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _run_in_processes(units: list[Unit], job: Job, workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, _start_worker, (workers,)) as executor,
    ):
        queue = manager.Queue()
        pending = {executor.submit(tokenize_unit, unit, job, _Reporter(queue)) for unit in units}
        try:
            _follow(pending, queue, progress)
        except BrokenProcessPool as error:
            raise ValueError(
                f"workers={workers}: a worker was killed, most likely for want of memory; take fewer workers and run "
                "the same command again, finished shards are kept"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _follow(pending: set[Future[None]], queue: Queue[tuple[int, int, int]], progress: Progress) -> None:
    while pending:
        done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
        for future in done:
            _raise_as_ours(future)
        for _ in range(queue.qsize()):
            progress.advance(*queue.get())


def _raise_as_ours(future: Future[None]) -> None:
    """Raise a worker's error, if it ended with one, from here and not from the library that carried it over."""
    try:
        future.result()
    except ValueError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class _Reporter:
    """Sends a worker's progress to the program that draws the bar."""

    queue: Queue[tuple[int, int, int]]

    def __call__(self, read_bytes: int, text_bytes: int, tokens: int) -> None:
        if read_bytes or tokens:
            self.queue.put((read_bytes, text_bytes, tokens))


def _start_worker(workers: int) -> None:
    """The tokenizer's own threads share the cores with those of the other workers."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    log.setup()


def _result_path(partial: Path, unit: Unit) -> Path:
    return partial / UNITS / f"{unit.name}.json"


def _sha256(piece: Piece) -> str | None:
    """sha256 of the piece's bytes on disk; None for a streamed data set."""
    if piece.format == "hub":
        return None
    digest = hashlib.sha256()
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        remaining = piece.num_bytes
        while remaining > 0 and (chunk := file.read(min(1 << 20, remaining))):
            digest.update(chunk)
            remaining -= len(chunk)
    return digest.hexdigest()
