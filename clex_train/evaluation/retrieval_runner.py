"""Retrieval scores of every method on the cells of a plan, on any number of ranks.

Prompts are distributed over the ranks like windows (`evaluation.runner.rank_batches`). All prompts of a cell need the
same number of forward passes, because under ZeRO-3 each forward is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clex_train.evaluation.decoding import greedy
from clex_train.evaluation.duplicates import MethodCell, method_cells
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.perplexity import evaluating
from clex_train.evaluation.results import Missing
from clex_train.evaluation.runner import Gauge, Inserted, keeping_table, rank_batches
from clex_train.evaluation.task_scores import MOST_CHARACTERS, TaskScore
from clex_train.lm_infinite.install import LmInfinite
from clex_train.resilience.oom_recovery import MemoryGuard
from clex_train.retrieval.plan import Cell
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.preallocated_cache import new_cache
from clex_train.scaling.frequency_table import Frequencies
from clex_train.utils import distributed, progress
from clex_train.utils.errors import StopRequested
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.records import convert

Outcome = Sequence[TaskScore | Missing]
"""Result of a cell: a row for each depth, or the reason for none."""


def evaluate(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, Frequencies],
    cells: Sequence[Cell],
    chunk_len: int = 1024,
    device: torch.device | None = None,
    interrupted: Callable[[], bool] | None = None,
    inserted: Inserted | None = None,
    cache_on_host: bool = False,
    kept: Partial | None = None,
) -> tuple[list[TaskScore], list[Missing]]:
    """Score the prompts of `cells` with the model's current weights under each method. Collective.

    Returns the scores, and the cells that ran out of memory (with the task as protocol). t is that of the cell's
    length, throughout prompt and answer. Arguments are as in `evaluation.runner.evaluate`. Raises `ConfigError` before
    the first forward when a length exceeds a table, and `StopRequested` once `interrupted` is true on a rank.
    """
    if not cells:
        return [], []
    # Fail before the first forward, not hours later at the longest length.
    for table in tables.values():
        table.least_upper_bound(max(cell.length for cell in cells), handle.context_len)
    device, kept, ranks = device or distributed.device(), kept or Partial(), distributed.world_size()
    how = Decoding(model, chunk_len, device, interrupted, cache_on_host, kept)
    todo = method_cells(tables, cells, handle.context_len, inserted or {})
    outcomes = {each: _found(each, kept) for each in todo}
    own = [each.cell for each in todo if each.source is None and not outcomes[each]]
    # Rounded up to whole rounds: a rank that is short repeats a prompt.
    total = sum(cell.length * -(-cell.size // ranks) * ranks for cell in own)
    with (
        evaluating(model),
        keeping_table(handle),
        progress.bar(total, "retrieval", is_shown=distributed.is_main(), unit="tok", unit_scale=True) as bar,
    ):
        for each in todo:
            if each.source is not None:
                outcomes[each] = outcomes[each] or _copies(each, outcomes[each.source])
            elif not outcomes[each]:
                handle.use(each.table)
                # One t for prompt and answer: a t that grew with each token would rotate the whole cache again.
                with (inserted or {}).get(each.method, nullcontext)() as put_in, handle.fixed(each.cell.length):
                    outcomes[each] = _computed(each, put_in, how, bar)
            scored = [vars(row) for row in outcomes[each] if isinstance(row, TaskScore)]
            kept.finish({each.key: scored} if scored else {})
    rows = [row for outcome in outcomes.values() for row in outcome]
    scores = [row for row in rows if isinstance(row, TaskScore)]
    return scores, [row for row in rows if isinstance(row, Missing)]


@dataclass(frozen=True)
class Decoding:
    """Execution settings, which change the results only by rounding."""

    model: nn.Module
    chunk_len: int
    """Tokens of a prompt in a forward pass."""
    device: torch.device
    interrupted: Callable[[], bool] | None
    cache_on_host: bool
    kept: Partial
    """Partial results, loaded and saved."""


def _found(each: MethodCell[Cell], kept: Partial) -> Outcome:
    """Return the rows from an interrupted evaluation; empty if it did not finish them."""
    found = kept.find([each.key], lambda rows: convert(rows, list[TaskScore]))
    return found[0] if found else []


def _copies(each: MethodCell[Cell], outcome: Outcome) -> Outcome:
    """Copy the outcome of equal prompts to this method."""
    return [
        replace(row, method=each.method, copied_from=row.key)
        if isinstance(row, TaskScore)
        else replace(row, method=each.method)
        for row in outcome
    ]


def _computed(each: MethodCell[Cell], put_in: object, how: Decoding, bar: tqdm) -> Outcome:
    """Compute the outcome of a cell."""
    cell = each.cell
    bar.set_description(f"{cell.name.value} {each.method}, {cell.length} tokens", refresh=False)
    guard = MemoryGuard(how.model, f"method {each.method}, task {cell.name.value}, {cell.length} tokens")
    # LM-Infinite has a cache of constant size, unless it also attends to middle tokens and needs all keys.
    make_cache = put_in.new_cache if isinstance(put_in, LmInfinite) and put_in.middle is None else None
    if make_cache is None and how.cache_on_host:
        make_cache = partial(new_cache, how.model, cell.length + cell.num_new, on_host=True)
    generated = _generated(each, make_cache, how, guard, bar)
    if reason := guard.shortage():
        return [Missing(each.method, cell.name.value, cell.length, reason)]
    return list(_judged(each.method, cell, generated))


def _generated(
    each: MethodCell[Cell], make_cache: Callable[[], Any] | None, how: Decoding, guard: MemoryGuard, bar: tqdm
) -> Tensor:
    """Generate answers: fingerprint and tokens of each prompt, int64 [size, 1 + num_new] on the CPU. Collective.

    The same on every rank. Rows are 0 where `guard` was out of memory.
    """
    cell, ranks = each.cell, distributed.world_size()
    generated, num_done = _left(each, how.kept)
    for number, (indices, counted) in enumerate(rank_batches(cell.size, 1, distributed.rank(), ranks)):
        gauge = Gauge(bar, ranks, int)
        if number >= num_done:
            answer = guard.attempt(partial(_ask, cell, int(indices[0]), how, make_cache, gauge))
            if counted[0] and answer is not None:
                generated[indices[0]] = answer
            # After running out of memory, rows are zeros in place of answers, so they must not be resumed from.
            if how.kept.is_due() and guard.fits_so_far():
                so_far = distributed.all_reduce_sum(generated).tolist()
                how.kept.keep(each.key, {"rounds": number + 1, "generated": so_far})
        gauge(cell.length)
        if how.interrupted and distributed.any_rank(how.interrupted()):
            raise StopRequested("the evaluation was interrupted")
    return distributed.all_reduce_sum(generated)


def _left(each: MethodCell[Cell], kept: Partial) -> tuple[Tensor, int]:
    """Load the pieces of an interrupted cell: int64 [size, 1 + num_new], and the number of finished rounds."""
    # On rank 0 only and zeros elsewhere, or the all-reduce would count them once per rank.
    generated = torch.zeros(each.cell.size, 1 + each.cell.num_new, dtype=torch.int64)
    left, num_done = kept.pieces(each.key), 0
    with suppress(KeyError, TypeError, ValueError):
        found = torch.tensor(left["generated"], dtype=torch.int64)
        if found.shape == generated.shape:
            num_done = int(left["rounds"])
            generated = found if distributed.is_main() else generated
    return generated, num_done


def _ask(
    cell: Cell, number: int, how: Decoding, make_cache: Callable[[], Any] | None, advance: Callable[[int], None]
) -> Tensor:
    ids = torch.tensor(cell.prompt(number).ids)
    num_chunks = cell.num_chunks(how.chunk_len)
    answer = greedy(how.model, ids.to(how.device), cell.num_new, num_chunks, make_cache, advance).cpu()
    return torch.cat((fingerprint(ids), answer))


def fingerprint(ids: Tensor) -> Tensor:
    """Hash a prompt's ids to int64 [1]."""
    # 8 bytes as an integer, so that it travels in the same all-reduce as the answer.
    digest = blake2b(ids.to(torch.int64).numpy().tobytes(), digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little", signed=True)])


def _judged(method: str, cell: Cell, generated: Tensor) -> Iterator[TaskScore]:
    """Judge the answers and yield a row for each depth."""
    # Every rank judges all answers: they are equal after the all-reduce, and judging is cheap.
    texts = [_text(cell.tokenizer, row) for row in generated[:, 1:].tolist()]
    shares = [cell.judge(number, text) for number, text in enumerate(texts)]
    for i, depth in enumerate(cell.depths):
        numbers = range(i * cell.num_prompts, (i + 1) * cell.num_prompts)
        at_depth = [shares[number] for number in numbers]
        yield TaskScore(
            task=cell.name.value,
            method=method,
            length=cell.length,
            depth=depth,
            correct=sum(share == 1 for share in at_depth),
            total=len(at_depth),
            score=sum(at_depth) / len(at_depth),
            seed=cell.seed,
            prompts=[
                _record(cell, number, int(generated[number, 0]), texts[number], shares[number]) for number in numbers
            ],
        )


def _record(cell: Cell, number: int, hashed: int, given: str, share: float) -> dict[str, Any]:
    """Describe a prompt and its answer for the result file."""
    # Not the prompt itself: it has as many tokens as the cell, and follows from seed, task, length and number.
    expected = cell.draft(number % cell.num_prompts).answers
    return {
        "number": number,
        "fingerprint": f"{hashed % 2**64:016x}",
        "expected": [answer[:MOST_CHARACTERS] for answer in expected],
        "given": given[:MOST_CHARACTERS],
        "share": share,
    }


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode generated ids up to EOS."""
    # Decoding never stops early, so ignore everything after EOS.
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True))
