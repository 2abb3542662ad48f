"""Perplexity of every method, protocol and length over one set of windows, on one rank or many.

Pieces are dealt to the ranks; every rank runs the same number of forwards (a rank that is short repeats a piece and
does not count it), because under ZeRO-3 each forward is a collective. Each token's nll comes from exactly one rank,
so the result does not depend on their number.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clex_train import distributed
from clex_train.evaluation.perplexity import PROTOCOLS, evaluating
from clex_train.evaluation.results import Results, Score
from clex_train.evaluation.windows import WindowSet
from clex_train.faults import StopRequested
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.table import FrequencyTable
from clex_train.settings.evaluation import Protocol


def evaluate(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, FrequencyTable],
    windows: WindowSet,
    lengths: Sequence[int],
    protocols: Sequence[Protocol],
    chunk_len: int = 1024,
    batch_tokens: int | None = None,
    device: torch.device | None = None,
    interrupted: Callable[[], bool] | None = None,
    inserted: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Results:
    """Score `windows` with the model's current weights under each of `tables` (method name -> frequencies).

    At most `chunk_len` tokens of a window and `batch_tokens` tokens over several windows (by default as many) go
    through the model at a time; the tokens are moved to `device` (by default the rank's). `inserted` says what a method
    puts into the model beside its table. Collective: every rank calls it with equal arguments and gets equal results.
    The handle's table and the model's mode are put back. Raises
    `ValueError` if a length exceeds what a table serves, before the first forward; `StopRequested` as soon as
    `interrupted`, asked between forwards, answers yes on one of the ranks.
    """
    for table in tables.values():
        table.least_upper_bound(max(lengths), handle.context_len)
    cells = [(method, protocol, length) for method in tables for protocol in protocols for length in sorted(lengths)]
    device = device or distributed.device()
    scores = []
    with evaluating(model), keeping_table(handle), progress(len(cells) * windows.tokens.size) as bar:
        for method, protocol, length in cells:
            bar.set_description(f"evaluate {method}, {protocol.value}, {length} tokens", refresh=False)
            handle.use(tables[method])
            start, put_in = time.perf_counter(), (inserted or {}).get(method, nullcontext)
            predict = partial(PROTOCOLS[protocol], model, handle, chunk_len=chunk_len)
            batch = max(1, (batch_tokens or chunk_len) // min(length, chunk_len))
            with put_in():
                nll = _token_nll(predict, windows.pieces(length), batch, device, bar, interrupted)
            scored = nll.view(windows.tokens.shape)[:, torch.from_numpy(windows.scored)].double()
            scores.append(
                Score(
                    method=method,
                    protocol=protocol.value,
                    length=length,
                    frequencies=tables[method].method,
                    t=tables[method].least_upper_bound(length, handle.context_len).t,
                    window_nll=scored.sum(dim=1).tolist(),
                    num_tokens=scored.numel(),
                    seconds=time.perf_counter() - start,
                )
            )
    return Results(scores, handle.context_len, describe(windows))


def describe(windows: WindowSet) -> dict[str, object]:
    """What was scored, as plain JSON."""
    return {
        "count": len(windows.tokens),
        "length": windows.longest,
        "score_stride": windows.score_stride,
        "fingerprint": windows.fingerprint,
        "documents": windows.documents.tolist(),
        "starts": windows.starts.tolist(),
    }


def deal(num_pieces: int, batch: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's batches as (piece indices, whether each counts); all ranks get batches of the same sizes."""
    per_rank = -(-num_pieces // world_size)
    slots = rank + world_size * np.arange(per_rank)
    for start in range(0, per_rank, batch):
        taken = slots[start : start + batch]
        yield taken % num_pieces, taken < num_pieces


def _token_nll(
    predict: Callable[[Tensor], Tensor],
    pieces: np.ndarray,
    batch: int,
    device: torch.device,
    bar: tqdm,
    interrupted: Callable[[], bool] | None,
) -> Tensor:
    """nll float32 [num_pieces, length] on the CPU, complete on every rank."""
    nll = torch.zeros(pieces.shape, dtype=torch.float32)
    for indices, counted in deal(len(pieces), batch, distributed.rank(), distributed.world_size()):
        values = predict(torch.from_numpy(pieces[indices]).to(device)).cpu()
        nll[indices[counted]] = values[counted]
        bar.update(values.numel() * distributed.world_size())
        if interrupted and distributed.any_rank(interrupted()):
            raise StopRequested("the evaluation was interrupted")
    return distributed.all_reduce_sum(nll)


@contextmanager
def keeping_table(handle: RotaryHandle) -> Iterator[None]:
    """The handle's table is put back, whatever was used inside."""
    table = handle.table
    try:
        yield
    finally:
        handle.use(table)


def progress(total: int) -> tqdm:
    """A bar over tokens on rank 0, silent elsewhere; rarely redrawn where it goes into a file."""
    return tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        disable=not distributed.is_main(),
    )
