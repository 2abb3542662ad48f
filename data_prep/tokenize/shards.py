"""Tokenize units of work into shards, in one process or several; a shard depends only on its unit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from clex_train.token_store.manifest import SPLITS, TOKENIZER, Shard, Source, TokenizerInfo, token_dtype
from clex_train.token_store.writer import ShardWriter
from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import BadFile, write_atomically
from clex_train.utils.records import read_record
from data_prep.chat import encoding as chat_encoding
from data_prep.chat.encoding import ChatJob
from data_prep.config import CorpusConfig
from data_prep.corpus.documents import Document, documents, text_content
from data_prep.corpus.readers import place
from data_prep.corpus.sources import Piece, Unit
from data_prep.progress import Progress
from data_prep.tokenize.engines import TokenizersEngine, load
from data_prep.tokenize.sampling import Mismatch, SampleCheck
from data_prep.workers import pool, reports

logger = log.get(__name__)

UNITS = "units"
BATCH_CHARS = 1_500_000
"""Characters per call of an engine: enough for its threads, small in memory."""
BATCH_PIECES = 1024

Advance = Callable[[int, int, int], object]


@dataclass(frozen=True)
class Job:
    """Settings that all units of a store share.

    `partial` is the directory to write in, `engine` the name of the encoder. With `falls_back`, a shard on which the
    engine and `tokenizers` disagree is tokenized again with `tokenizers`. `cut` splits texts where that changes no id.
    With `bos`, each document begins with BOS. Documents whose hash is below `below` are held out. With `chat`,
    documents are conversations, which the engine, `cut` and `bos` have no part in.
    """

    partial: Path
    corpus: CorpusConfig
    tokenizer: TokenizerInfo
    cut: Callable[[str], Iterator[tuple[str, bool]]]
    engine: str
    falls_back: bool
    bos: bool
    below: float
    chat: ChatJob | None = None


@dataclass(frozen=True)
class Result:
    """Result of a unit: shards by split (only splits with documents), the sources read, and the engine used.

    `modified` has the modification time of each source's file when it was read, in nanoseconds; 0 without a file.
    """

    shards: dict[str, Shard]
    sources: list[Source]
    modified: list[int]
    engine: str


@dataclass(frozen=True)
class _Piece:
    """A piece of a document's text; see `Document` for the other fields."""

    text: str
    is_first: bool
    is_last: bool
    split: str
    text_hash: int
    source: int
    record: int


def run_units(units: list[Unit], job: Job, workers: int, progress: Progress) -> None:
    """Tokenize the units; finished ones remain after an error.

    Raises:
        InputError: bad input, with its place, or a worker was killed.
    """
    if workers == 1 or len(units) < 2:
        for unit in units:
            tokenize_unit(unit, job, progress.advance)
    else:
        _run_in_processes(units, job, min(workers, len(units)), progress)


def tokenize_unit(unit: Unit, job: Job, advance: Advance) -> None:
    """Write the shards of one unit, then the record that marks it finished.

    Raises:
        InputError: bad input, with its place, or ids that differ from `tokenizers` when falling back is not allowed.
    """
    reported = [0, 0, 0]

    def report(*amounts: int) -> None:
        reported[:] = map(sum, zip(reported, amounts, strict=True))
        advance(*amounts)

    try:
        result = _tokenize(unit, job, job.engine, report)
    except _OtherIds as error:
        if not job.falls_back:
            remedy = "set tokenizer.engine=auto or tokenizers"
            raise ConfigError("tokenizer.engine", job.engine, f"{error}; {remedy}") from error
        logger.warning("shard %s: %s; tokenizing it again with tokenizers", unit.name, error)
        # Take back the progress of the discarded attempt, or the bar would exceed 100 %.
        advance(*(-amount for amount in reported))
        result = _tokenize(unit, job, TokenizersEngine.name, advance)
    # Written last and atomically: a unit counts as finished only if its shards are complete.
    write_atomically(_result_path(job.partial, unit), json.dumps(dataclasses.asdict(result)).encode())


class _OtherIds(ValueError):
    """The ids differ from those of `tokenizers`; the message names the document."""


def _tokenize(unit: Unit, job: Job, engine: str, advance: Advance) -> Result:
    # Before reading: if a file changes meanwhile, its time differs later and it is hashed again.
    modified = [_modified(piece) for piece in unit.pieces]
    counts: list[Counter[str]] = [Counter() for _ in unit.pieces]
    # The dtype follows from the vocabulary, not from the ids seen: all shards of a store must agree.
    dtype = token_dtype(job.tokenizer.vocab_size)
    with ExitStack() as stack:
        has_mask = job.chat is not None
        writers = {s: stack.enter_context(ShardWriter(job.partial / s, unit.name, dtype, has_mask)) for s in SPLITS}
        items = _documents(unit, job, counts, advance)
        if job.chat is not None:
            by_source = dict(enumerate(counts, start=unit.first_source))
            pieces = dict(enumerate(unit.pieces, start=unit.first_source))
            facts = (job.partial / TOKENIZER, job.tokenizer)
            chat_encoding.write(items, job.chat, job.corpus, pieces, *facts, writers, by_source, advance)
        else:
            _encode(_pieces(items, job.cut), unit, job, engine, writers, advance)
        shards = {split: writer.close() for split, writer in writers.items() if writer.num_documents}
    sources = [
        Source(p.path, p.start, p.stop, sha256_of(p), dict(sorted(c.items())), is_part=p.format == "hub")
        for p, c in zip(unit.pieces, counts, strict=True)
    ]
    return Result(shards, sources, modified, engine)


def _encode(
    pieces: Iterator[_Piece], unit: Unit, job: Job, name: str, writers: Mapping[str, ShardWriter], advance: Advance
) -> None:
    """Encode the pieces of documents in order and write their ids as they come."""
    engine = load(name, job.partial / TOKENIZER)
    eos = np.array([job.tokenizer.eos_id], np.uint32)
    bos = np.array([job.tokenizer.bos_id] if job.bos else [], np.uint32)
    check = None
    if name != TokenizersEngine.name:
        check = SampleCheck(load(TokenizersEngine.name, job.partial / TOKENIZER), unit.name)
    # Pieces of several documents share a batch, and a long document spans several.
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        encoded = engine.encode(texts)
        if check:
            _compare(check, batch, encoded, unit)
        for piece, ids in zip(batch, encoded, strict=True):
            writer = writers[piece.split]
            if piece.is_first:
                writer.write(bos)
            writer.write(ids)
            if piece.is_last:
                writer.write(eos)
                writer.end_document(piece.text_hash, piece.source, piece.record)
        borders = sum(piece.is_last + len(bos) * piece.is_first for piece in batch)
        advance(0, sum(map(_utf8_bytes, texts)), sum(map(len, encoded)) + borders)


def _compare(check: SampleCheck, batch: list[_Piece], encoded: Sequence[np.ndarray], unit: Unit) -> None:
    try:
        check.compare([piece.text for piece in batch], encoded)
    except Mismatch as error:
        piece = batch[error.index]
        where = place(unit.pieces[piece.source - unit.first_source], piece.record)
        raise _OtherIds(f"{where}: gigatoken and tokenizers give different ids for this document") from error


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def load_result(partial: Path, unit: Unit) -> Result | None:
    """Return the record of a finished unit, or None."""
    path = _result_path(partial, unit)
    if not path.is_file():
        return None
    try:
        return read_record(path, Result, within=partial)
    except BadFile as error:
        raise ConfigError(
            path, None, f"{error.reason}; remove this file, and the same command writes the shard again"
        ) from error


def check_sources(unit: Unit, result: Result) -> None:
    """Check that the files of a finished shard have not changed.

    Raises:
        ConfigError: names the file that changed.
    """
    for piece, source, modified in zip(unit.pieces, result.sources, result.modified, strict=True):
        # The time only triggers hashing: copying a corpus to another disk changes times but no content.
        if _modified(piece) != modified and sha256_of(piece) != source.sha256:
            raise ConfigError(
                piece.path,
                None,
                f"changed (with the same size) since shard {unit.name} was written; restore the earlier "
                "file, or start over with overwrite=true",
            )


def _documents(unit: Unit, job: Job, counts: list[Counter[str]], advance: Advance) -> Iterator[tuple[int, Document]]:
    """Yield (number of the source in the store, document) over all pieces of a unit and report the bytes read."""
    keep, content_of = (job.chat.keep, job.chat.content) if job.chat else ((), text_content)
    for i, piece in enumerate(unit.pieces):
        reported = 0
        for document in documents(piece, job.corpus, counts[i], keep, job.below, content_of):
            yield unit.first_source + i, document
            advance(document.consumed - reported, 0, 0)
            reported = document.consumed
            del document  # free it before reading the next one, which may be as large
        advance(piece.num_bytes - reported, 0, 0)


def _pieces(
    items: Iterable[tuple[int, Document]], cut: Callable[[str], Iterator[tuple[str, bool]]]
) -> Iterator[_Piece]:
    for source, document in items:
        for number, (text, is_last) in enumerate(cut(document.text)):
            yield _Piece(text, number == 0, is_last, document.split, document.text_hash, source, document.record)
        del document  # see above


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces into batches, large enough for the engine's threads and bounded in memory."""
    batch: list[_Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _run_in_processes(units: list[Unit], job: Job, workers: int, progress: Progress) -> None:
    def advance(report: bytes) -> None:
        progress.advance(*_REPORT.unpack(report))

    with reports(advance) as reporting, pool(workers, _start_worker, workers, reporting) as executor:
        pending = {executor.submit(tokenize_unit, unit, job, _report) for unit in units}
        try:
            _follow(pending)
        except BrokenProcessPool as error:
            raise ConfigError(
                "workers",
                workers,
                "a worker was killed, most likely out of memory; use fewer workers and run "
                "the same command again, finished shards are kept",
            ) from error


def _follow(pending: set[Future[None]]) -> None:
    while pending:
        done, pending = wait(pending, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


_reporting: Connection | None = None
_REPORT = struct.Struct("3q")


def _report(read_bytes: int, text_bytes: int, tokens: int) -> None:
    """Send a worker's progress to the program that draws the bar."""
    assert _reporting is not None
    if read_bytes or text_bytes or tokens:
        with suppress(BrokenPipeError):  # the main program was killed, and this worker is about to end
            _reporting.send_bytes(_REPORT.pack(read_bytes, text_bytes, tokens))


def _start_worker(workers: int, reporting: Connection) -> None:
    """Prepare a worker: divide the cores among the tokenizers' threads, and set up logging."""
    # A global, because a connection can be passed to a process only when it starts, not with each task.
    global _reporting
    _reporting = reporting
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    log.setup()


def _result_path(partial: Path, unit: Unit) -> Path:
    return partial / UNITS / f"{unit.name}.json"


def _modified(piece: Piece) -> int:
    return 0 if piece.format == "hub" else os.stat(piece.path).st_mtime_ns


def sha256_of(piece: Piece) -> str | None:
    """Hash the piece's bytes on disk; None for a streamed data set."""
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
