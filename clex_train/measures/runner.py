"""Scores by teacher forcing of every method on the cells of a plan, on any number of ranks.

Rows are distributed over the ranks like windows (`evaluation.runner.rank_batches`). Every row of a cell has the same
number of tokens, so all ranks run the same forwards, as ZeRO-3 needs.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clex_train.config.measures import Measure
from clex_train.evaluation.duplicates import MethodCell, method_cells
from clex_train.evaluation.measure_scores import MeasureScore, to_row, with_error
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.results import Missing, measure_score
from clex_train.evaluation.runner import (
    BAR,
    Feeding,
    Gauge,
    Inserted,
    bounded_memory,
    keeping_table,
    rank_batches,
    work_of,
)
from clex_train.measures.plan import Cell
from clex_train.measures.tail import read_tails
from clex_train.resilience.oom_recovery import MemoryGuard
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import Frequencies
from clex_train.utils import distributed, progress
from clex_train.utils.errors import StopRequested

Outcome = Sequence[MeasureScore | Missing]
"""Result of a cell: a score for each quantity and place, or the reason for none."""


def evaluate(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, Frequencies],
    cells: Sequence[Cell],
    feeding: Feeding,
    inserted: Inserted | None = None,
) -> tuple[list[MeasureScore], list[Missing]]:
    """Score the rows of `cells` with the model's current weights under each method. Collective.

    Returns the scores, the same on every rank, and the cells that ran out of memory (with the measure as protocol).
    Arguments are as in `evaluation.runner.evaluate`. Raises `ConfigError` before the first forward when a length
    exceeds a table, and `StopRequested` once `feeding.interrupted` is true on a rank.
    """
    if not cells:
        return [], []
    # Fail before the first forward, not hours later at the longest length.
    for table in tables.values():
        table.least_upper_bound(max(cell.length for cell in cells), handle.context_len)
    todo = method_cells(tables, cells, handle.context_len, inserted or {})
    kept = feeding.kept
    outcomes = {each: _found(each, kept) for each in todo}
    # Copies and resumed cells cost nothing, so the bar leaves them out.
    own = [each.cell for each in todo if each.source is None and not outcomes[each]]
    total = sum(work_of(model, cell.length) * cell.num_rows for cell in own)
    with (
        bounded_memory(model, feeding.device),
        keeping_table(handle),
        progress.bar(total, "measures", is_shown=distributed.is_main(), bar_format=BAR) as bar,
    ):
        for each in todo:
            if each.source is not None:
                outcomes[each] = outcomes[each] or _copies(each, outcomes[each.source])
            elif not outcomes[each]:
                handle.use(each.table)
                with (inserted or {}).get(each.method, nullcontext)():
                    outcomes[each] = _computed(model, handle, each, feeding, bar)
            scored = [to_row(row) for row in outcomes[each] if isinstance(row, MeasureScore)]
            kept.finish({each.key: scored} if scored else {})
    rows = [row for outcome in outcomes.values() for row in outcome]
    scores = [row for row in rows if isinstance(row, MeasureScore)]
    return scores, [row for row in rows if isinstance(row, Missing)]


def _found(each: MethodCell[Cell], kept: Partial) -> Outcome:
    """Return the scores from an interrupted evaluation; empty if it did not finish them."""
    found = kept.find([each.key], lambda rows: [measure_score(row) for row in rows])
    return found[0] if found else []


def _copies(each: MethodCell[Cell], outcome: Outcome) -> Outcome:
    """Copy the outcome of equal rows to this method."""
    return [
        replace(row, method=each.method, copied_from=row.key)
        if isinstance(row, MeasureScore)
        else replace(row, method=each.method)
        for row in outcome
    ]


def _computed(model: nn.Module, handle: RotaryHandle, each: MethodCell[Cell], feeding: Feeding, bar: tqdm) -> Outcome:
    """Compute the outcome of a cell."""
    cell = each.cell
    bar.set_description(f"{cell.measure.value} {each.method}, {cell.length} tokens", refresh=False)
    guard = MemoryGuard(model, f"method {each.method}, measure {cell.measure.value}, {cell.length} tokens")
    started = _Started(each, feeding.kept)
    _read_rows(model, handle, cell, feeding, guard, started, bar)
    # Each row is nonzero on one rank only, so the sum is exact and independent of the number of ranks.
    tails = distributed.all_reduce_sum(started.tails).numpy()
    if reason := guard.shortage():
        return [Missing(each.method, cell.measure.value, cell.length, reason)]
    return [with_error(score) for score in _scores(each.method, cell, tails)]


class _Started:
    """A cell in progress: this rank's part of `tails` float32 [rows, 2, A], 0 elsewhere, and the finished batches."""

    def __init__(self, each: MethodCell[Cell], kept: Partial) -> None:
        self.key, self._kept, self.batches = each.key, kept, 0
        self.tails = torch.zeros(each.cell.num_rows, 2, each.cell.tail_len, dtype=torch.float32)
        # Damaged pieces count as none.
        with suppress(KeyError, TypeError, ValueError):
            self._take_up(kept.pieces(self.key))

    def _take_up(self, left: Any) -> None:
        if left is None:
            return
        tails = np.frombuffer(b64decode(left["tails"]), dtype="<f4").reshape(self.tails.shape)
        self.batches = int(left["batches"])
        # On rank 0 only, or the all-reduce would count it once per rank.
        if distributed.is_main():
            self.tails = torch.from_numpy(tails.copy())

    def keep(self) -> None:
        """Save the rows so far. Collective."""
        tails = distributed.all_reduce_sum(self.tails).numpy().astype("<f4")
        self._kept.keep(self.key, {"batches": self.batches, "tails": b64encode(tails.tobytes()).decode()})


def _read_rows(
    model: nn.Module,
    handle: RotaryHandle,
    cell: Cell,
    feeding: Feeding,
    guard: MemoryGuard,
    started: _Started,
    bar: tqdm,
) -> None:
    """Fill in the tails of this rank's rows, skipping finished batches, until `guard` is out of memory."""
    ranks, done = distributed.world_size(), 0
    batches = rank_batches(cell.num_rows, feeding.batch(cell.length), distributed.rank(), ranks)
    for number, (indices, counted) in enumerate(batches):
        before, done = done, min(cell.num_rows, done + len(indices) * ranks)
        gauge = Gauge(bar, done - before, partial(work_of, model))
        if number >= started.batches:
            values = guard.attempt(partial(_read, model, handle, cell, indices, feeding, gauge))
            if values is not None:
                for index, value in compress(zip(indices, values, strict=True), counted):
                    started.tails[index] = value
            started.batches = number + 1
            # After running out of memory, rows have zeros in place of results, so they must not be resumed from.
            if feeding.kept.is_due() and guard.fits_so_far():
                started.keep()
        gauge(cell.length)
        # Check between batches only: within one, the other ranks may be waiting in a collective.
        if feeding.interrupted and distributed.any_rank(feeding.interrupted()):
            raise StopRequested("the evaluation was interrupted")


def _read(
    model: nn.Module, handle: RotaryHandle, cell: Cell, indices: np.ndarray, feeding: Feeding, gauge: Gauge
) -> Tensor:
    """Build rows, read them and return their tails float32 [B, 2, A] on the CPU."""
    tokens = torch.from_numpy(np.stack([cell.row(int(index)) for index in indices])).to(feeding.device)
    return read_tails(model, handle, tokens, cell.tail_len, feeding.chunk_len, feeding.cache_on_host, gauge).cpu()


def _scores(method: str, cell: Cell, tails: np.ndarray) -> Iterator[MeasureScore]:
    """Yield a score for each place and quantity from `tails` [rows, 2, A]."""
    num_prompts = len(cell.frames)
    for i, place in enumerate(cell.places):
        numbers = range(i * num_prompts, (i + 1) * num_prompts)
        # Every rank builds the pairs again, since only one had them, and the units of the bootstrap come with them.
        groups = [cell.pair(number).group for number in numbers]
        counts = [frame.answer_len for frame in cell.frames]
        nll = [
            [math.fsum(row[0, len(row[0]) - count :].tolist()) for row in tails[2 * number : 2 * number + 2]]
            for number, count in zip(numbers, counts, strict=True)
        ]
        exact = [
            float(tails[2 * n, 1, tails.shape[2] - count :].all()) for n, count in zip(numbers, counts, strict=True)
        ]
        for quantity, sums in _quantities(cell.measure, nll, exact).items():
            yield MeasureScore(
                measure=cell.measure.value,
                quantity=quantity,
                method=method,
                length=cell.length,
                place=place,
                sums=sums,
                counts=[1] * num_prompts if quantity == "exact" else counts,
                groups=groups,
                seed=cell.seed,
            )


def _quantities(measure: Measure, nll: Sequence[Sequence[float]], exact: list[float]) -> dict[str, list[float]]:
    """Name the sums of each prompt [P]; `nll` [P, 2] has the right answer first."""
    right, other = [first for first, _ in nll], [second for _, second in nll]
    gap = [second - first for first, second in nll]
    if measure is Measure.repetition:
        return {"nll": right, "baseline": other, "gain": gap}
    return {"exact": exact, "nll": right, "gap": gap}
