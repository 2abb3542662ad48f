"""Retrieval by every method over the cells of a plan, on one rank or many: the same loop for all.

Prompts are dealt to the ranks as windows are (`evaluation.runner.deal`). Each needs the same number of forwards,
because under ZeRO-3 a forward is a collective: as many chunks of the prompt, as many generated tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clex_train import distributed, progress
from clex_train.attention.hf_interface import LmInfinite
from clex_train.evaluation.perplexity import evaluating
from clex_train.evaluation.results import MOST_CHARACTERS, MOST_PROMPTS, Missing, TaskScore
from clex_train.evaluation.retrieval.decoding import greedy
from clex_train.evaluation.retrieval.plan import Cell
from clex_train.evaluation.room import Room
from clex_train.evaluation.runner import deal, keeping_table
from clex_train.faults import StopRequested
from clex_train.rope.growing import new_cache
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.table import Frequencies


def evaluate(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, Frequencies],
    cells: Sequence[Cell],
    chunk_len: int = 1024,
    device: torch.device | None = None,
    interrupted: Callable[[], bool] | None = None,
    inserted: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    cache_on_host: bool = False,
) -> tuple[list[TaskScore], list[Missing]]:
    """Score the prompts of `cells` with the model's current weights under each of `tables` (by method name).

    Returns the scores, and the cells that the memory of a rank did not hold (under the task's name as protocol).
    t is what the cell's length needs, throughout prompt and answer. Arguments and collective behaviour are those of
    `evaluation.runner.evaluate`. Raises `ValueError` if a length exceeds what a table serves, before the first
    forward; `StopRequested` when `interrupted` answers yes on one of the ranks.
    """
    if not cells:
        return [], []
    for table in tables.values():
        table.least_upper_bound(max(cell.length for cell in cells), handle.context_len)
    device = device or distributed.device()
    scores, missing = list[TaskScore](), list[Missing]()
    ranks = distributed.world_size()
    # A rank that is short repeats a prompt.
    total = len(tables) * sum(cell.length * -(-cell.size // ranks) * ranks for cell in cells)
    with (
        evaluating(model),
        keeping_table(handle),
        progress.bar(total, "retrieval", is_shown=distributed.is_main(), unit="tok", unit_scale=True) as bar,
    ):
        for method, table in tables.items():
            handle.use(table)
            for cell in cells:
                bar.set_description(f"{cell.name.value} {method}, {cell.length} tokens", refresh=False)
                room = Room(model, f"method {method}, task {cell.name.value}, {cell.length} tokens")
                with (inserted or {}).get(method, nullcontext)() as put_in, handle.fixed(cell.length):
                    make_cache = put_in.new_cache if isinstance(put_in, LmInfinite) else None
                    if make_cache is None and cache_on_host:
                        make_cache = partial(new_cache, model, cell.length + cell.num_new, on_host=True)
                    ask = _asking(model, cell, chunk_len, device, make_cache)
                    generated = _generated(ask, cell, room, bar, interrupted)
                if reason := room.lacking():
                    missing.append(Missing(method, cell.name.value, cell.length, reason))
                    continue
                scores += _judged(method, cell, generated)
    return scores, missing


def _asking(
    model: nn.Module, cell: Cell, chunk_len: int, device: torch.device, make_cache: Callable[[], Any] | None
) -> Callable[[int], Tensor]:
    def ask(number: int) -> Tensor:
        ids = torch.tensor(cell.prompt(number).ids)
        answer = greedy(model, ids.to(device), cell.num_new, cell.num_chunks(chunk_len), make_cache).cpu()
        return torch.cat((fingerprint(ids), answer))

    return ask


def fingerprint(ids: Tensor) -> Tensor:
    """int64 [1]: 8 bytes of a hash of a prompt's ids, which is what the ranks tell each other of it."""
    digest = blake2b(ids.to(torch.int64).numpy().tobytes(), digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little", signed=True)])


def _generated(
    ask: Callable[[int], Tensor], cell: Cell, room: Room, bar: tqdm, interrupted: Callable[[], bool] | None
) -> Tensor:
    """Fingerprint and answer of each prompt of a cell that `room` holds, int64 [size, 1 + num_new] on the CPU.

    The same on every rank.
    """
    generated = torch.zeros(cell.size, 1 + cell.num_new, dtype=torch.int64)
    for indices, counted in deal(cell.size, 1, distributed.rank(), distributed.world_size()):
        answer = room.attempt(partial(ask, int(indices[0])))
        if counted[0] and answer is not None:
            generated[indices[0]] = answer
        bar.update(cell.length * distributed.world_size())
        if interrupted and distributed.any_rank(interrupted()):
            raise StopRequested("the evaluation was interrupted")
    return distributed.all_reduce_sum(generated)


def _judged(method: str, cell: Cell, generated: Tensor) -> Iterator[TaskScore]:
    """A row for each depth."""
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
                _record(cell, number, int(generated[number, 0]), texts[number], shares[number])
                for number in numbers[:MOST_PROMPTS]
            ],
        )


def _record(cell: Cell, number: int, hashed: int, given: str, share: float) -> dict[str, Any]:
    """Return what a file keeps of a prompt and its answer."""
    expected = cell.draft(number % cell.num_prompts).answers
    return {
        "number": number,
        "fingerprint": f"{hashed % 2**64:016x}",
        "expected": [answer[:MOST_CHARACTERS] for answer in expected],
        "given": given[:MOST_CHARACTERS],
        "share": share,
    }


def _text(tokenizer: Any, ids: list[int]) -> str:
    """What was generated before the end of the text."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True))
