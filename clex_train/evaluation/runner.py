"""Perplexity of every method, protocol and length over one set of windows, on one rank or many.

Spans of windows are dealt to the ranks; every rank runs the same number of forwards (a rank that is short repeats a
span and does not count it), because under ZeRO-3 each forward is a collective. Each token's nll comes from exactly one
rank, so the result does not depend on their number.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clex_train import distributed, progress
from clex_train.attention.lean import lean_attention
from clex_train.evaluation.perplexity import Predict, evaluating
from clex_train.evaluation.protocols import Reading, Span, curve
from clex_train.evaluation.results import Missing, Results, Score, with_standard_errors
from clex_train.evaluation.room import Room
from clex_train.evaluation.scoring_head import tiled_head
from clex_train.evaluation.windows import WindowSet
from clex_train.faults import StopRequested
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.table import Frequencies

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""Its unit is work and not tokens, which take longer where the windows are long; tqdm ends `desc` with a colon."""


class Job(NamedTuple):
    """Spans of one length that one or more protocols read in the same way."""

    length: int
    spans: tuple[Span, ...]
    read: Predict
    readings: list[Reading]

    @property
    def protocols(self) -> str:
        """Their names."""
        return "+".join(reading.protocol.value for reading in self.readings)


@dataclass(frozen=True)
class Feeding:
    """How windows go through a model; no number depends on it."""

    chunk_len: int
    """Tokens of a span in a forward."""
    batch_tokens: int
    """Tokens of several spans in a forward."""
    device: torch.device
    interrupted: Callable[[], bool] | None = None
    cache_on_host: bool = False

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
    inserted: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    cache_on_host: bool = False,
) -> Results:
    """Score `windows` with the model's current weights under each of `tables` (method name -> frequencies).

    `readings` says what is read and scored (`protocols.readings`); what two of them read alike is read once.
    At most `chunk_len` tokens of a window and `batch_tokens` tokens over several windows (by default as many) go
    through the model at a time; the tokens are moved to `device` (by default the rank's). `inserted` says what a method
    puts into the model beside its table, `cache_on_host` whether keys and values wait in host memory. Collective: every
    rank calls it with equal arguments and gets equal results. The handle's table and the model's mode are put back.
    What the memory of a rank does not hold is logged, stands in `missing`, and the rest goes on. Raises
    `ValueError` if a length exceeds what a table serves, before the first forward; `StopRequested` as soon as
    `interrupted`, asked between forwards, answers yes on one of the ranks; `RunStopped` if memory runs out while ranks
    share the weights.
    """
    for table in tables.values():
        table.least_upper_bound(windows.longest, handle.context_len)
    device = device or distributed.device()
    feeding = Feeding(chunk_len, batch_tokens or chunk_len, device, interrupted, cache_on_host)
    todo, scores, missing = jobs(readings), list[Score](), list[Missing]()
    total = len(tables) * sum(_work(model, job) * len(windows.tokens) * len(job.spans) for job in todo)
    with (
        lean(model, feeding.device),
        keeping_table(handle),
        progress.bar(total, "evaluate", is_shown=distributed.is_main(), bar_format=BAR) as bar,
    ):
        for method, table in tables.items():
            handle.use(table)
            for job in todo:
                bar.set_description(f"evaluate {method}, {job.protocols}, {job.length} tokens", refresh=False)
                room = Room(model, f"method {method}, protocol {job.protocols}, {job.length} tokens")
                start = time.perf_counter()
                with (inserted or {}).get(method, nullcontext)():
                    nll = _window_nll(model, handle, windows, job, feeding, room, bar)
                if reason := room.lacking():
                    missing += [Missing(method, each.protocol.value, job.length, reason) for each in job.readings]
                    continue
                t = table.least_upper_bound(job.length, handle.context_len).t
                made_by = {"method": method, "frequencies": table.method, "t": t}
                scores += _scores(job, nll, windows, **made_by, seconds=time.perf_counter() - start)
    order = [(method, reading.protocol.value) for method in tables for reading in readings]
    scores.sort(key=lambda score: order.index((score.method, score.protocol)))
    return Results(scores, handle.context_len, describe(windows), missing=missing)


@contextmanager
def lean(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode in bounded memory: logits in tiles, attention on a CPU without masks. Collective."""
    with evaluating(model), lean_attention(model), tiled_head(model, device):
        yield


def jobs(readings: Sequence[Reading]) -> list[Job]:
    """What there is to read, shortest spans first, each with the protocols that it serves."""
    found: dict[tuple[int, tuple[Span, ...], Predict], list[Reading]] = {}
    for reading in readings:
        for length, spans in reading.spans.items():
            found.setdefault((length, spans, reading.read), []).append(reading)
    return sorted((Job(*key, served) for key, served in found.items()), key=lambda job: job.length)


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


def _window_nll(
    model: nn.Module, handle: RotaryHandle, windows: WindowSet, job: Job, feeding: Feeding, room: Room, bar: tqdm
) -> np.ndarray:
    """nll float32 [W, longest], complete on every rank; 0 for tokens that no span gives or that `room` did not hold."""
    nll, done, num_ranks = torch.zeros(windows.tokens.shape, dtype=torch.float32), 0, distributed.world_size()
    num_pieces = len(windows.tokens) * len(job.spans)
    for indices, counted in deal(num_pieces, feeding.batch(job.length), distributed.rank(), num_ranks):
        places = [(index // len(job.spans), job.spans[index % len(job.spans)]) for index in indices]
        pieces = np.stack([windows.span(row, span.start, span.stop) for row, span in places])
        values = room.attempt(partial(_read, model, handle, pieces, job, feeding))
        if values is not None:
            for (row, span), value in compress(zip(places, values, strict=True), counted):
                nll[row, span.first : span.stop] = value[span.first - span.start :]
        before, done = done, min(num_pieces, done + len(indices) * num_ranks)
        bar.update((done - before) * _work(model, job))
        if feeding.interrupted and distributed.any_rank(feeding.interrupted()):
            raise StopRequested("the evaluation was interrupted")
    return distributed.all_reduce_sum(nll).numpy()


def _read(model: nn.Module, handle: RotaryHandle, pieces: np.ndarray, job: Job, feeding: Feeding) -> torch.Tensor:
    """nll float32 [B, N] on the CPU."""
    tokens = torch.from_numpy(pieces).to(feeding.device)
    return job.read(model, handle, tokens, feeding.chunk_len, feeding.cache_on_host).cpu()


def _scores(job: Job, nll: np.ndarray, windows: WindowSet, **shared: Any) -> list[Score]:
    """A score for each protocol that the job serves, of `nll` [W, longest]."""
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


def _work(model: nn.Module, job: Job) -> int:
    """Relative cost of a span of N tokens: N (1 + N / 12 d), for 24 d^2 operations of products and 2 d N of attention.

    d is the width of the model. Long spans come last, so without the second term the time left would be understated.
    """
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return round(job.length * (1 + job.length / (12 * width))) if width else job.length


@contextmanager
def keeping_table(handle: RotaryHandle) -> Iterator[None]:
    """The handle's table is put back, whatever was used inside."""
    table = handle.table
    try:
        yield
    finally:
        handle.use(table)
