"""Forecast of an evaluation's cost: cells, forwards, tokens, memory, and a time from one timed chunk.

The chunk goes through the real weights, since time and memory depend on the device, the dtype and the sharding; nothing
is scored and no file is written. Forwards are those of one rank. Time grows with the work N (1 + N / 12 d) of a text of
N tokens for a model of width d (`evaluation.runner`), and decoding by the token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clex_train.console import program
from clex_train.evaluation.duplicates import MethodCell
from clex_train.evaluation.grid import Cell
from clex_train.evaluation.perplexity import one_shot
from clex_train.evaluation.runner import Feeding, bounded_memory, keeping_table, work_of
from clex_train.evaluation.scoring_head import score_chunk
from clex_train.evaluation.streaming import Stream
from clex_train.measures import plan as measures
from clex_train.model_config.size import num_parameters
from clex_train.models.load import LoadedModel
from clex_train.preflight import sequence_parallel
from clex_train.retrieval import plan as prompts
from clex_train.tracking import summary
from clex_train.utils import distributed

GIB = 2**30
MOST_TIMED = 1024
"""Tokens of the timed chunk, at most."""


@dataclass(frozen=True)
class Amount:
    """Cost of a part of an evaluation."""

    cells: int = 0
    copies: int = 0
    """Cells that equal others by definition."""
    forwards: int = 0
    """Forward passes of one rank."""
    tokens: int = 0
    """Read by all ranks together."""
    work: int = 0
    """Work of one rank, as defined by the module."""
    decoded: int = 0
    """Tokens that one rank generates, each by a forward."""
    cached: int = 0
    """Largest number of tokens in a rank's KV cache."""
    longest: int = 0
    """Tokens of the longest text."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.cells + other.cells,
            self.copies + other.copies,
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.work + other.work,
            self.decoded + other.decoded,
            max(self.cached, other.cached),
            max(self.longest, other.longest),
        )


def windows_amount(
    model: nn.Module, todo: Sequence[Cell], num_windows: int, feeding: Feeding, context_len: int
) -> Amount:
    """Sum the cost of the perplexity cells."""
    total = Amount()
    for cell in todo:
        job, protocols = cell.job, len(cell.job.readings)
        if cell.source is not None:
            total += Amount(cells=protocols, copies=protocols)
            continue
        pieces, batch = num_windows * len(job.spans), feeding.batch(job.length)
        per_rank = _shared(pieces)
        step = job.length if job.read is one_shot else context_len
        parts = [min(step, job.length - start) for start in range(0, job.length, step)]
        chunks = sum(-(-part // feeding.chunk_len) for part in parts)
        total += Amount(
            cells=protocols,
            forwards=-(-per_rank // batch) * chunks,
            tokens=pieces * job.length,
            work=per_rank * work_of(model, job.length),
            cached=min(batch, per_rank) * job.length if chunks > 1 else 0,
            longest=job.length,
        )
    return total


def prompts_amount(model: nn.Module, todo: Sequence[MethodCell[prompts.Cell]], chunk_len: int) -> Amount:
    """Sum up the cells of retrieval."""
    total = Amount()
    for each in todo:
        cell = each.cell
        if each.source is not None:
            total += Amount(cells=1, copies=1)
            continue
        per_rank = _shared(cell.size)
        total += Amount(
            cells=1,
            forwards=per_rank * (cell.num_chunks(chunk_len) + cell.num_new - 1),
            tokens=cell.size * cell.length,
            work=per_rank * work_of(model, cell.prompt_len),
            decoded=per_rank * (cell.num_new - 1),
            cached=cell.length,
            longest=cell.prompt_len,
        )
    return total


def forced_amount(model: nn.Module, todo: Sequence[MethodCell[measures.Cell]], feeding: Feeding) -> Amount:
    """Sum up the cells of measures by teacher forcing."""
    total = Amount()
    for each in todo:
        cell = each.cell
        if each.source is not None:
            total += Amount(cells=1, copies=1)
            continue
        # Two rows for each prompt: the right answer, and what it is compared with.
        batch, per_rank = feeding.batch(cell.length), _shared(cell.num_rows)
        # The answer is a forward of its own, so that only its logits are computed.
        chunks = -(-(cell.length - 1 - cell.tail_len) // feeding.chunk_len) + 1
        total += Amount(
            cells=1,
            forwards=-(-per_rank // batch) * chunks,
            tokens=cell.num_rows * cell.length,
            work=per_rank * work_of(model, cell.length),
            cached=min(batch, per_rank) * cell.length,
            longest=cell.length,
        )
    return total


def stream_amount(model: nn.Module, text: Stream, methods: Sequence[str], chunk_len: int) -> Amount:
    """Sum the cost of one text by each method, and in windows of L."""
    at_once = text.context_len * max(1, chunk_len // text.context_len)
    windows, length = -(-text.num_tokens // at_once), text.num_tokens
    plain = "none" in methods
    # Under LM-Infinite a token costs what it does within L, however far the stream has come.
    bounded = len(methods) + 1 - plain
    work = bounded * (length // text.context_len) * work_of(model, text.context_len)
    return Amount(
        cells=len(methods) + 1,
        forwards=windows + len(methods) * -(-length // chunk_len),
        tokens=(len(methods) + 1) * length,
        work=work + (work_of(model, length) if plain else 0),
        cached=length if plain else text.context_len,
        longest=length if plain else text.context_len,
    )


def print_forecast(loaded: LoadedModel, amount: Amount, chunk_len: int, on_host: bool, sharded: bool) -> None:
    """Time one chunk and print the cost of the evaluation, on rank 0. Collective."""
    seconds = _seconds(loaded, amount, max(1, min(chunk_len, MOST_TIMED, amount.longest)))
    lines = [
        summary.labelled("cells", f"{amount.cells:,}, of which {amount.copies:,} equal others and are copied"),
        summary.labelled("forwards", f"{amount.forwards:,} on each of {distributed.world_size()} ranks"),
        summary.labelled("tokens", f"{amount.tokens:,}"),
        summary.labelled("memory", ", ".join(_memory(loaded.model, amount, on_host, sharded))),
        summary.labelled("time", f"about {_readable(seconds)} after loading, by one timed chunk"),
    ]
    if distributed.is_main():
        program.echo("\n".join(lines))


def _memory(model: nn.Module, amount: Amount, on_host: bool, sharded: bool) -> Iterator[str]:
    weights = num_parameters(model) * next(model.parameters()).element_size()
    yield f"weights {weights / (distributed.world_size() if sharded else 1) / GIB:.2f} GiB a rank"
    if amount.cached:
        size = amount.cached * _bytes_of_token(model) / GIB
        yield f"keys and values at most {size:.2f} GiB{' in host memory' if on_host else ''}"
    yield "and the activations of a chunk"


def _bytes_of_token(model: nn.Module) -> int:
    """Count the bytes of keys and values in all layers."""
    config: Any = model.config
    _, key_heads, width = sequence_parallel.heads_of(config)
    num_layers: int = config.get_text_config().num_hidden_layers
    return 2 * num_layers * key_heads * width * next(model.parameters()).element_size()


def _seconds(loaded: LoadedModel, amount: Amount, num_tokens: int) -> float:
    chunk = _timed(loaded, num_tokens)
    token = _timed(loaded, 1) if amount.decoded else 0.0
    return chunk * amount.work / work_of(loaded.model, num_tokens) + token * amount.decoded


def _timed(loaded: LoadedModel, num_tokens: int) -> float:
    """Measure the seconds of a forward of `num_tokens` tokens, after a warm-up."""
    device = distributed.device()
    tokens = torch.zeros((1, num_tokens), dtype=torch.int64, device=device)
    with bounded_memory(loaded.model, device), keeping_table(loaded.handle):
        # The model's own frequencies take as long as any.
        loaded.handle.use(None)
        for _ in range(2):
            start = time.perf_counter()
            score_chunk(loaded.model, tokens, input_ids=tokens, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - start


def _shared(pieces: int) -> int:
    """Return how many of the pieces the busiest rank has."""
    return -(-pieces // distributed.world_size())


def _readable(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
