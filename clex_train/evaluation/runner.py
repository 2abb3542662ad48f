"""Perplexity of every method, protocol and length over one set of windows, on one rank or many.

Spans of windows are dealt to the ranks; every rank runs the same number of forwards (a rank that is short repeats a
span and does not count it), because under ZeRO-3 each forward is a collective. Each token's nll comes from exactly one
rank, so the result does not depend on their number.
"""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clex_train.attention.chunked_sdpa import chunked_attention
from clex_train.evaluation.duplicates import identity
from clex_train.evaluation.out_of_memory import Room
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.perplexity import Advance, Predict, evaluating, one_shot, warn_of_overflow
from clex_train.evaluation.protocols import Reading, Span, curve
from clex_train.evaluation.results import Missing, Results, Score, exact_score, score_key, with_standard_errors
from clex_train.evaluation.scoring_head import tiled_head
from clex_train.evaluation.windows import WindowSet
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.table import Frequencies
from clex_train.utils import distributed, progress
from clex_train.utils.errors import StopRequested

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""Its unit is work and not tokens, which take longer where the windows are long; tqdm ends `desc` with a colon."""

Inserted = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""What methods put into the model beside their tables, by the methods' names."""

Outcome = Sequence[Score | Missing]
"""Of a cell: a score for each of its protocols, or why there is none."""


class Job(NamedTuple):
    """Spans of one length that one or more protocols read in the same way."""

    length: int
    spans: tuple[Span, ...]
    read: Predict
    readings: tuple[Reading, ...]

    @property
    def protocols(self) -> str:
        """Their names."""
        return "+".join(reading.protocol.value for reading in self.readings)

    def lengths_read(self, context_len: int) -> Iterator[int]:
        """List the numbers of tokens whose t a span is read at."""
        yield from () if self.read is one_shot else range(context_len, self.length, context_len)
        yield self.length


@dataclass(frozen=True, eq=False)
class Cell:
    """A job under a method, for which the forwards are shared."""

    method: str
    table: Frequencies
    job: Job
    source: Cell | None
    """The cell that this one equals by definition; None for one with forwards of its own."""

    @property
    def keys(self) -> list[str]:
        """Those of its scores."""
        return [score_key(self.method, reading.protocol.value, self.job.length) for reading in self.job.readings]

    @property
    def name(self) -> str:
        """For messages."""
        return f"method {self.method}, protocol {self.job.protocols}, {self.job.length} tokens"


@dataclass(frozen=True)
class Feeding:
    """How windows go through a model; no number depends on it beyond rounding."""

    chunk_len: int
    """Tokens of a span in a forward."""
    batch_tokens: int
    """Tokens of several spans in a forward."""
    device: torch.device
    interrupted: Callable[[], bool] | None = None
    cache_on_host: bool = False
    kept: Partial = field(default_factory=Partial)
    """What was finished before, and is kept from now on."""

    def batch(self, length: int) -> int:
        """Spans of `length` tokens that are read together."""
        return max(1, self.batch_tokens // min(length, self.chunk_len))


def evaluate(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, Frequencies],
    windows: WindowSet,
    readings: Sequence[Reading],
    chunk_len: int = 1024,
    batch_tokens: int | None = None,
    device: torch.device | None = None,
    interrupted: Callable[[], bool] | None = None,
    inserted: Inserted | None = None,
    cache_on_host: bool = False,
    kept: Partial | None = None,
) -> Results:
    """Score `windows` with the model's current weights under each of `tables` (method name -> frequencies).

    `readings` says what is read and scored (`protocols.readings`), `inserted` what a method puts into the model beside
    its table, `cache_on_host` whether keys and values wait in host memory, `kept` what an interrupted evaluation has
    finished. What two readings read alike is read once, and equal cells of two methods are computed once. At most
    `chunk_len` tokens of a window and `batch_tokens` over several windows (by default as many) go through the model at
    a time, on `device` (by default the rank's). Collective: every rank calls it with equal arguments and gets equal
    results. The handle's table and the model's mode are put back. What the memory of a rank does not hold is logged
    and stands in `missing`. Raises `ValueError` if a length exceeds what a table serves, before the first forward;
    `StopRequested` as soon as `interrupted`, asked between forwards, answers yes on one of the ranks; `RunStopped` if
    memory runs out while ranks share the weights.
    """
    for table in tables.values():
        table.least_upper_bound(windows.longest, handle.context_len)
    device, kept = device or distributed.device(), kept or Partial()
    feeding = Feeding(chunk_len, batch_tokens or chunk_len, device, interrupted, cache_on_host, kept)
    todo = cells(tables, readings, handle.context_len, inserted or {})
    outcomes = {cell: _found(cell, kept) for cell in todo}
    own = [cell for cell in todo if cell.source is None and not outcomes[cell]]
    total = sum(work_of(model, cell.job.length) * len(cell.job.spans) for cell in own) * len(windows.tokens)
    with (
        lean(model, feeding.device),
        keeping_table(handle),
        progress.bar(total, "evaluate", is_shown=distributed.is_main(), bar_format=BAR) as bar,
    ):
        for cell in todo:
            if cell.source is not None:
                outcomes[cell] = outcomes[cell] or _copies(cell, outcomes[cell.source], handle.context_len)
            elif not outcomes[cell]:
                handle.use(cell.table)
                with (inserted or {}).get(cell.method, nullcontext)():
                    outcomes[cell] = _computed(model, handle, windows, cell, feeding, bar)
            kept.finish({each.key: vars(each) for each in outcomes[cell] if isinstance(each, Score)})
    order = [(method, reading.protocol.value) for method in tables for reading in readings]
    scores, missing = _sorted([each for outcome in outcomes.values() for each in outcome], order)
    warn_of_overflow(scores)
    return Results(scores, handle.context_len, describe(windows), missing=missing)


def _sorted(found: list[Score | Missing], order: list[tuple[str, str]]) -> tuple[list[Score], list[Missing]]:
    """Part scores, in the order of (method, protocol), from what could not be computed."""
    scores = [each for each in found if isinstance(each, Score)]
    scores.sort(key=lambda score: order.index((score.method, score.protocol)))
    return scores, [each for each in found if isinstance(each, Missing)]


@contextmanager
def lean(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode in bounded memory: logits in tiles, attention on a CPU without masks. Collective."""
    with evaluating(model), chunked_attention(model), tiled_head(model, device):
        yield


def jobs(readings: Sequence[Reading], context_len: int) -> list[Job]:
    """List what there is to read, shortest spans first, each with the protocols that it serves; `context_len` is L."""
    found: dict[tuple[int, tuple[Span, ...], Predict], list[Reading]] = {}
    for reading in readings:
        for length, spans in reading.spans.items():
            # Within L there is a single t, however the tokens arrive.
            read = one_shot if length <= context_len else reading.read
            found.setdefault((length, spans, read), []).append(reading)
    return sorted((Job(*key, tuple(served)) for key, served in found.items()), key=lambda job: job.length)


def cells(
    tables: Mapping[str, Frequencies], readings: Sequence[Reading], context_len: int, inserted: Collection[str] = ()
) -> list[Cell]:
    """List the jobs of the first method, then those of the second; `inserted` are methods with a mask of their own."""
    todo, first = list[Cell](), dict[object, Cell]()
    for method, table in tables.items():
        for number, job in enumerate(jobs(readings, context_len)):
            does = identity(method, table, job.lengths_read(context_len), context_len, inserted)
            cell = Cell(method, table, job, first.get((number, does)))
            first.setdefault((number, does), cell)
            todo.append(cell)
    return todo


def describe(windows: WindowSet) -> dict[str, object]:
    """What was read, as plain JSON."""
    return {
        "count": len(windows.tokens),
        "length": windows.longest,
        "fingerprint": windows.content,
        "documents": windows.documents.tolist(),
        "starts": windows.starts.tolist(),
        **({} if windows.bos_id is None else {"bos_id": windows.bos_id}),
    }


def deal(num_pieces: int, batch: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's batches as (indices of pieces, whether each counts); all ranks get batches of the same sizes."""
    per_rank = -(-num_pieces // world_size)
    slots = rank + world_size * np.arange(per_rank)
    for start in range(0, per_rank, batch):
        taken = slots[start : start + batch]
        yield taken % num_pieces, taken < num_pieces


def _found(cell: Cell, kept: Partial) -> Outcome:
    """Return the cell's scores as an interrupted evaluation left them; empty if it did not finish them."""
    return kept.find(cell.keys, exact_score) or []


def _copies(cell: Cell, outcome: Outcome, context_len: int) -> Outcome:
    """Copy the outcome of an equal cell under this cell's name."""
    t = cell.table.least_upper_bound(cell.job.length, context_len).t
    made_by: dict[str, Any] = {"method": cell.method, "frequencies": cell.table.method, "t": t}
    return [
        replace(each, **made_by, seconds=0.0, copied_from=each.key)
        if isinstance(each, Score)
        else replace(each, method=cell.method)
        for each in outcome
    ]


def _computed(
    model: nn.Module, handle: RotaryHandle, windows: WindowSet, cell: Cell, feeding: Feeding, bar: tqdm
) -> Outcome:
    """Compute a score for each protocol of the cell, or why there is none."""
    job = cell.job
    bar.set_description(f"evaluate {cell.method}, {job.protocols}, {job.length} tokens", refresh=False)
    room, started = Room(model, cell.name), _Started(cell, windows, feeding.kept)
    _read_windows(model, handle, windows, job, feeding, room, started, bar)
    nll = distributed.all_reduce_sum(started.nll).numpy()
    if reason := room.lacking():
        return [Missing(cell.method, each.protocol.value, job.length, reason) for each in job.readings]
    t = cell.table.least_upper_bound(job.length, handle.context_len).t
    made_by = {"method": cell.method, "frequencies": cell.table.method, "t": t}
    return _scores(job, nll, windows, **made_by, seconds=started.seconds())


class _Started:
    """A cell in progress: `nll` float32 [W, longest], this rank's share of it, and the batches that are done.

    What an interrupted evaluation left of the cell is with rank 0. Tokens without a nll are 0.
    """

    def __init__(self, cell: Cell, windows: WindowSet, kept: Partial) -> None:
        self.key, self._kept, self._start = "+".join(cell.keys), kept, time.perf_counter()
        self.nll = torch.zeros(windows.tokens.shape, dtype=torch.float32)
        self.batches, self._before = 0, 0.0
        with suppress(KeyError, TypeError, ValueError):
            self._take_up(kept.pieces(self.key))

    def seconds(self) -> float:
        """Wall time spent on the cell, before the interruption and since."""
        return self._before + time.perf_counter() - self._start

    def _take_up(self, left: Any) -> None:
        if left is None:
            return
        rows = np.frombuffer(b64decode(left["nll"]), dtype="<f4").reshape(-1, self.nll.shape[1])
        self.batches, self._before = int(left["batches"]), float(left["seconds"])
        if distributed.is_main():
            self.nll[: len(rows)] = torch.from_numpy(rows.copy())

    def keep(self, num_rows: int) -> None:
        """Keep the first rows, which hold all there is so far. Collective."""
        rows = distributed.all_reduce_sum(self.nll[:num_rows]).numpy().astype("<f4")
        content = {"batches": self.batches, "seconds": self.seconds(), "nll": b64encode(rows.tobytes()).decode()}
        self._kept.keep(self.key, content)


def _read_windows(
    model: nn.Module,
    handle: RotaryHandle,
    windows: WindowSet,
    job: Job,
    feeding: Feeding,
    room: Room,
    started: _Started,
    bar: tqdm,
) -> None:
    """Fill in the nll of this rank's spans, as far as `room` holds them; the batches that are done are passed over."""
    num_spans, num_ranks = len(job.spans), distributed.world_size()
    num_pieces, done, work = len(windows.tokens) * num_spans, 0, partial(work_of, model)
    for number, (indices, counted) in enumerate(
        deal(num_pieces, feeding.batch(job.length), distributed.rank(), num_ranks)
    ):
        before, done = done, min(num_pieces, done + len(indices) * num_ranks)
        gauge = Gauge(bar, done - before, work)
        if number >= started.batches:
            places = [(index // num_spans, job.spans[index % num_spans]) for index in indices]
            pieces = np.stack([windows.span(row, span.start, span.stop) for row, span in places])
            values = room.attempt(partial(_read, model, handle, pieces, job, feeding, gauge))
            if values is not None:
                for (row, span), value in compress(zip(places, values, strict=True), counted):
                    started.nll[row, span.first : span.stop] = value[span.first - span.start :]
            started.batches = number + 1
            # Zeros in place of what did not fit are no results to go on from.
            if feeding.kept.is_due() and room.holds_so_far():
                started.keep(-(-done // num_spans))
        gauge(job.length)
        if feeding.interrupted and distributed.any_rank(feeding.interrupted()):
            raise StopRequested("the evaluation was interrupted")


class Gauge:
    """Moves a bar by the work of several spans that are read at once: `gauge(num_tokens)` says how far each is."""

    def __init__(self, bar: tqdm, num_spans: int, work: Callable[[int], int]) -> None:
        self._bar, self._num_spans, self._work, self._shown = bar, num_spans, work, 0

    def __call__(self, num_tokens: int) -> None:
        now = self._num_spans * self._work(num_tokens)
        self._bar.update(now - self._shown)
        self._shown = now


def _read(
    model: nn.Module, handle: RotaryHandle, pieces: np.ndarray, job: Job, feeding: Feeding, advance: Advance
) -> torch.Tensor:
    """Read windows; returns nll float32 [B, N] on the CPU."""
    tokens = torch.from_numpy(pieces).to(feeding.device)
    return job.read(model, handle, tokens, feeding.chunk_len, feeding.cache_on_host, advance).cpu()


def _scores(job: Job, nll: np.ndarray, windows: WindowSet, **shared: Any) -> Outcome:
    """Compute a score for each protocol that the job serves, of `nll` [W, longest]."""
    return [
        with_standard_errors(
            Score(
                protocol=reading.protocol.value,
                length=job.length,
                window_nll=nll[:, reading.scored].sum(axis=1, dtype=np.float64).tolist(),
                num_tokens=len(nll) * int(reading.scored.sum()),
                fingerprint=windows.fingerprint(reading.scored),
                curve=curve(nll, job.spans, reading.scored, reading.most_bins),
                **shared,
            ),
            windows.documents.tolist(),
        )
        for reading in job.readings
    ]


def work_of(model: nn.Module, num_tokens: int) -> int:
    """Relative cost of reading N tokens: N (1 + N / 12 d), for 24 d^2 operations of products and 2 d N of attention.

    d is the width of the model. Long spans come last, so without the second term the time left would be understated.
    """
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return round(num_tokens * (1 + num_tokens / (12 * width))) if width else num_tokens


@contextmanager
def keeping_table(handle: RotaryHandle) -> Iterator[None]:
    """The handle's table is put back, whatever was used inside."""
    table = handle.table
    try:
        yield
    finally:
        handle.use(table)
