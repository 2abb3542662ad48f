"""Perplexity of every method, protocol and length on one set of windows, on any number of ranks.

Spans are distributed over the ranks. Each token's nll comes from exactly one rank, so the result does not depend on
their number.
"""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clex_train.attention.chunked_sdpa import chunked_attention
from clex_train.evaluation.grid import Cell, Job, cells
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.perplexity import Advance, evaluating, warn_of_overflow
from clex_train.evaluation.protocols import Reading, curve
from clex_train.evaluation.results import Missing, Results, Score, exact_score, with_standard_errors
from clex_train.evaluation.scoring_head import tiled_head
from clex_train.resilience.oom_recovery import MemoryGuard
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import Frequencies
from clex_train.utils import distributed, progress
from clex_train.utils.errors import StopRequested

if TYPE_CHECKING:
    from clex_train.evaluation.windows import WindowSet

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""Format of the bar. No counts: its unit is relative cost, since a token costs more in a longer window."""

Inserted = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Method name to a context manager that installs its changes to the model, besides the table."""

Outcome = Sequence[Score | Missing]
"""Result of a cell: for each of its protocols, a score or the reason for none."""


@dataclass(frozen=True)
class Feeding:
    """Execution settings, which change the numbers only by rounding."""

    chunk_len: int
    """Tokens of a span in a forward pass."""
    batch_tokens: int
    """Tokens of all spans in a forward pass."""
    device: torch.device
    interrupted: Callable[[], bool] | None = None
    cache_on_host: bool = False
    """True keeps keys and values in host memory."""
    kept: Partial = field(default_factory=Partial)
    """Partial results, loaded and saved."""

    def batch(self, length: int) -> int:
        """Return the number of spans of `length` tokens that are read together."""
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
    """Score `windows` with the model's current weights under each method. Collective, with equal arguments.

    Every rank gets equal results. Cells that run out of memory are logged and listed in `missing`. The handle's table
    and the model's mode are restored.

    Args:
        tables: method name to frequencies.
        readings: spans and scored tokens (`protocols.readings`); equal spans are read once for all protocols.
        chunk_len: tokens of a window in a forward pass.
        batch_tokens: tokens of all windows in a forward pass; `chunk_len` by default.
        device: this rank's device by default.
        interrupted: called between forward passes.
        inserted: changes to the model that a method makes besides its table.
        cache_on_host: keep keys and values in host memory.
        kept: partial results of an interrupted evaluation.

    Raises `ConfigError` before the first forward when a length exceeds a table, `StopRequested` once `interrupted` is
    true on a rank, and `RunStopped` when out of memory while ranks share the weights.
    """
    # Fail before the first forward, not hours later at the longest length.
    for table in tables.values():
        table.least_upper_bound(windows.longest, handle.context_len)
    device, kept = device or distributed.device(), kept or Partial()
    feeding = Feeding(chunk_len, batch_tokens or chunk_len, device, interrupted, cache_on_host, kept)
    todo = cells(tables, readings, handle.context_len, inserted or {})
    found = _outcomes(model, handle, windows, todo, feeding, inserted or {})
    order = [(method, reading.protocol.value) for method in tables for reading in readings]
    scores, missing = _sorted(found, order)
    warn_of_overflow(scores)
    return Results(scores, handle.context_len, describe(windows), missing=missing)


def _outcomes(
    model: nn.Module,
    handle: RotaryHandle,
    windows: WindowSet,
    todo: Sequence[Cell],
    feeding: Feeding,
    inserted: Inserted,
) -> list[Score | Missing]:
    """Compute, copy or resume the outcome of each cell, in the order of `todo`."""
    kept = feeding.kept
    outcomes = {cell: _found(cell, kept) for cell in todo}
    # Copies and resumed cells cost nothing, so the bar leaves them out.
    own = [cell for cell in todo if cell.source is None and not outcomes[cell]]
    total = sum(work_of(model, cell.job.length) * len(cell.job.spans) for cell in own) * len(windows.tokens)
    with (
        bounded_memory(model, feeding.device),
        keeping_table(handle),
        progress.bar(total, "evaluate", is_shown=distributed.is_main(), bar_format=BAR) as bar,
    ):
        for cell in todo:
            if cell.source is not None:
                outcomes[cell] = outcomes[cell] or _copies(cell, outcomes[cell.source], handle.context_len)
            elif not outcomes[cell]:
                handle.use(cell.table)
                with inserted.get(cell.method, nullcontext)():
                    outcomes[cell] = _computed(model, handle, windows, cell, feeding, bar)
            kept.finish({each.key: vars(each) for each in outcomes[cell] if isinstance(each, Score)})
    return [each for outcome in outcomes.values() for each in outcome]


def _sorted(found: list[Score | Missing], order: list[tuple[str, str]]) -> tuple[list[Score], list[Missing]]:
    """Separate scores, sorted by `order` of (method, protocol), from missing cells."""
    scores = [each for each in found if isinstance(each, Score)]
    # Computed by length, but tables and files list them by method and protocol; the sort is stable.
    scores.sort(key=lambda score: order.index((score.method, score.protocol)))
    return scores, [each for each in found if isinstance(each, Missing)]


@contextmanager
def bounded_memory(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Bound the memory inside the block: tiled logits, and CPU attention without masks. Collective."""
    with evaluating(model), chunked_attention(model), tiled_head(model, device):
        yield


def describe(windows: WindowSet) -> dict[str, object]:
    """Describe a window set as plain JSON."""
    return {
        "count": len(windows.tokens),
        "length": windows.longest,
        "fingerprint": windows.content,
        "documents": windows.documents.tolist(),
        "starts": windows.starts.tolist(),
        **({} if windows.bos_id is None else {"bos_id": windows.bos_id}),
    }


def rank_batches(num_pieces: int, batch: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's batches as (piece indices [n], mask of those that count [n])."""
    # Under ZeRO-3 each forward is a collective, so all ranks need batches of the same number and size. A rank that is
    # short repeats a piece and does not count it.
    per_rank = -(-num_pieces // world_size)
    slots = rank + world_size * np.arange(per_rank)
    for start in range(0, per_rank, batch):
        taken = slots[start : start + batch]
        yield taken % num_pieces, taken < num_pieces


def _found(cell: Cell, kept: Partial) -> Outcome:
    """Return the cell's scores from an interrupted evaluation; empty if it did not finish them."""
    return kept.find(cell.keys, exact_score) or []


def _copies(cell: Cell, outcome: Outcome, context_len: int) -> Outcome:
    """Copy the outcome of an equal cell to this method."""
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
    """Compute the outcome of a cell."""
    job = cell.job
    nll, reason, seconds = token_nll(model, handle, windows, cell, feeding, bar)
    if reason:
        return [Missing(cell.method, each.protocol.value, job.length, reason) for each in job.readings]
    t = cell.table.least_upper_bound(job.length, handle.context_len).t
    made_by = {"method": cell.method, "frequencies": cell.table.method, "t": t}
    return _scores(job, nll, windows, **made_by, seconds=seconds)


def token_nll(
    model: nn.Module, handle: RotaryHandle, windows: WindowSet, cell: Cell, feeding: Feeding, bar: tqdm
) -> tuple[np.ndarray, str, float]:
    """Read the windows under the table in force. Collective; the same on every rank.

    Returns the nll float32 [W, longest], 0 where no span gives one; the reason if it ran out of memory; and seconds.
    """
    bar.set_description(f"evaluate {cell.method}, {cell.job.protocols}, {cell.job.length} tokens", refresh=False)
    guard, started = MemoryGuard(model, cell.name), _Started(cell, windows, feeding.kept)
    _read_windows(model, handle, windows, cell.job, feeding, guard, started, bar)
    # Each token is nonzero on one rank only, so the sum is exact and independent of the number of ranks.
    nll = distributed.all_reduce_sum(started.nll).numpy()
    return nll, guard.shortage(), started.seconds()


class _Started:
    """A cell in progress: this rank's part of `nll` float32 [W, longest], 0 elsewhere, and the finished batches."""

    def __init__(self, cell: Cell, windows: WindowSet, kept: Partial) -> None:
        self.key, self._kept, self._start = "+".join(cell.keys), kept, time.perf_counter()
        self.nll = torch.zeros(windows.tokens.shape, dtype=torch.float32)
        self.batches, self._before = 0, 0.0
        # Damaged pieces count as none.
        with suppress(KeyError, TypeError, ValueError):
            self._take_up(kept.pieces(self.key))

    def seconds(self) -> float:
        """Return the wall time spent on the cell, including that before an interruption."""
        return self._before + time.perf_counter() - self._start

    def _take_up(self, left: Any) -> None:
        if left is None:
            return
        rows = np.frombuffer(b64decode(left["nll"]), dtype="<f4").reshape(-1, self.nll.shape[1])
        self.batches, self._before = int(left["batches"]), float(left["seconds"])
        # On rank 0 only, or the all-reduce would count it once per rank.
        if distributed.is_main():
            self.nll[: len(rows)] = torch.from_numpy(rows.copy())

    def keep(self, num_rows: int) -> None:
        """Save the first `num_rows` rows, the only ones that are not zero so far. Collective."""
        rows = distributed.all_reduce_sum(self.nll[:num_rows]).numpy().astype("<f4")
        content = {"batches": self.batches, "seconds": self.seconds(), "nll": b64encode(rows.tobytes()).decode()}
        self._kept.keep(self.key, content)


def _read_windows(
    model: nn.Module,
    handle: RotaryHandle,
    windows: WindowSet,
    job: Job,
    feeding: Feeding,
    guard: MemoryGuard,
    started: _Started,
    bar: tqdm,
) -> None:
    """Fill in the nll of this rank's spans, skipping finished batches, until `guard` is out of memory."""
    num_spans, num_ranks = len(job.spans), distributed.world_size()
    num_pieces, done, work = len(windows.tokens) * num_spans, 0, partial(work_of, model)
    for number, (indices, counted) in enumerate(
        rank_batches(num_pieces, feeding.batch(job.length), distributed.rank(), num_ranks)
    ):
        before, done = done, min(num_pieces, done + len(indices) * num_ranks)
        gauge = Gauge(bar, done - before, work)
        if number >= started.batches:
            places = [(index // num_spans, job.spans[index % num_spans]) for index in indices]
            pieces = np.stack([windows.span(row, span.start, span.stop) for row, span in places])
            values = guard.attempt(partial(_read, model, handle, pieces, job, feeding, gauge))
            if values is not None:
                for (row, span), value in compress(zip(places, values, strict=True), counted):
                    started.nll[row, span.first : span.stop] = value[span.first - span.start :]
            started.batches = number + 1
            # After running out of memory, rows have zeros in place of results, so they must not be resumed from.
            if feeding.kept.is_due() and guard.fits_so_far():
                started.keep(-(-done // num_spans))
        gauge(job.length)
        # Check between batches only: within one, the other ranks may be waiting in a collective.
        if feeding.interrupted and distributed.any_rank(feeding.interrupted()):
            raise StopRequested("the evaluation was interrupted")


class Gauge:
    """Advances a bar by the cost of several spans read together: call it with the tokens of each read so far."""

    def __init__(self, bar: tqdm, num_spans: int, work: Callable[[int], int]) -> None:
        self._bar, self._num_spans, self._work, self._shown = bar, num_spans, work, 0

    def __call__(self, num_tokens: int) -> None:
        now = self._num_spans * self._work(num_tokens)
        self._bar.update(now - self._shown)
        self._shown = now


def _read(
    model: nn.Module, handle: RotaryHandle, pieces: np.ndarray, job: Job, feeding: Feeding, advance: Advance
) -> torch.Tensor:
    """Read spans and return their nll float32 [B, N] on the CPU."""
    tokens = torch.from_numpy(pieces).to(feeding.device)
    return job.read(model, handle, tokens, feeding.chunk_len, feeding.cache_on_host, advance).cpu()


def _scores(job: Job, nll: np.ndarray, windows: WindowSet, **shared: Any) -> Outcome:
    """Compute a score for each protocol of the job from `nll` [W, longest]."""
    return [
        with_standard_errors(
            Score(
                protocol=reading.protocol.value,
                length=job.length,
                window_nll=reading.window_nll(nll),
                num_tokens=sum(reading.window_tokens(len(nll))),
                # Most protocols score equally many tokens of each window, which needs no list.
                window_tokens=reading.window_tokens(len(nll)) if reading.scored.ndim == 2 else [],
                fingerprint=windows.fingerprint(reading.scored),
                curve=curve(nll, job.spans, reading.scored, reading.most_bins),
                **shared,
            ),
            windows.documents.tolist(),
        )
        for reading in job.readings
    ]


def work_of(model: nn.Module, num_tokens: int) -> int:
    """Estimate the relative cost of reading N tokens: N (1 + N / 12 d), with the model's width d."""
    # Per token and layer: 24 d^2 operations for matrix products, 2 d N for causal attention. Long spans come last, so
    # without the second term the remaining time would be underestimated.
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return round(num_tokens * (1 + num_tokens / (12 * width))) if width else num_tokens


@contextmanager
def keeping_table(handle: RotaryHandle) -> Iterator[None]:
    """Restore the handle's table at the end of the block."""
    table = handle.table
    try:
        yield
    finally:
        handle.use(table)
