"""Training draws: the scale factor t of a step, and the positions of a row's tokens in [0, t * L).

    grid of a row of n tokens    k * L / n,  k = 0 .. floor(n * t) - 1      (integers for n = L, fractions for n > L)

`random` and `uniform` take n points of the grid (CLEX, arXiv 2310.16450). `skip` places chunks of consecutive positions
with random gaps between them (PoSE, arXiv 2309.10400). `plain` is 0, 1, 2, ... for rows that fit into t * L. All start
at 0 and increase strictly. A row shorter than L is stretched over t * L by `random` and `uniform`; `skip` keeps its
neighbours 1 apart. Draws are functions of (seed, step) and (seed, row), so ranks, accumulation and resume cannot change
them.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from clex_train.utils.seeding import generator


def draw_t(seed: int, step: int, t_max: float, distribution: str = "uniform") -> float:
    """Draw t in [1, t_max], continuous, equal on every rank of optimizer step `step`.

    `distribution`: `uniform` (the paper), or `log_uniform`, log t ~ U[0, log t_max], where every doubling is equally
    likely.
    """
    share = generator(seed, "t", step).uniform()
    return INVERSE_CDF[distribution](share, t_max)


def is_as_used(seed: int, step: int, share: float) -> bool:
    """Decide whether optimizer step `step` trains what inference reads, with probability `share`."""
    # A stream of its own, so that the draws of t and positions are the same with and without such steps.
    return bool(generator(seed, "as_used", step).uniform() < share)


INVERSE_CDF: dict[str, Callable[[float, float], float]] = {
    "uniform": lambda share, t_max: 1.0 + (t_max - 1.0) * share,
    "log_uniform": lambda share, t_max: float(t_max**share),
}
"""Inverse distribution functions: map a share of the draws to the t below which it lies."""


def draw_batch(
    kind: str,
    row_indices: Sequence[int],
    *,
    seq_len: int,
    context_len: int,
    t: float,
    seed: int,
    mix_random: float = 0.25,
    max_chunks: int = 8,
) -> Float64[Tensor, "B S"]:
    """Draw the positions of a micro batch; each row depends only on (seed, global row index) and t."""
    rows = [
        draw_positions(
            kind,
            seq_len,
            context_len,
            t,
            # Keyed by the global row index: the rank that reads a row does not matter.
            generator(seed, "positions", row),
            mix_random=mix_random,
            max_chunks=max_chunks,
        )
        for row in row_indices
    ]
    return torch.stack(rows)


def draw_document_batch(
    kind: str,
    row_indices: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    context_len: int,
    t: float,
    seed: int,
    mix_random: float = 0.25,
    max_chunks: int = 8,
) -> Float64[Tensor, "B S"]:
    """Draw positions like `draw_batch` for rows of documents of `lengths` tokens.

    Each document depends only on (seed, row, its number in the row) and t.
    """
    rows = [
        draw_document_positions(
            kind,
            of_row,
            context_len,
            t,
            [generator(seed, "positions", row, document) for document in range(len(of_row))],
            mix_random=mix_random,
            max_chunks=max_chunks,
        )
        for row, of_row in zip(row_indices, lengths, strict=True)
    ]
    return torch.stack(rows)


def draw_positions(
    kind: str,
    num_tokens: int,
    context_len: float,
    t: float,
    rng: np.random.Generator,
    *,
    mix_random: float = 0.25,
    max_chunks: int = 8,
) -> Float64[Tensor, " n"]:
    """Draw the positions of one row of `num_tokens` in [0, t * context_len): first 0, strictly increasing, float64.

    `kind` is `random`, `uniform`, `skip` (2 to `max_chunks` chunks), `mix` (`random` with probability `mix_random`,
    else `skip`) or `plain` (for num_tokens <= t * context_len).

    Raises:
        ValueError: an argument is out of range, by name.
    """
    _check(kind, num_tokens, context_len, t, mix_random, max_chunks)
    # Drawn from the row's own generator, so the choice is reproducible with the row.
    if kind == "mix":
        kind = "random" if rng.random() < mix_random else "skip"
    if kind == "plain":
        return torch.arange(num_tokens, dtype=torch.float64)
    if kind == "skip":
        return torch.from_numpy(skip_positions(num_tokens, context_len, t, rng, max_chunks))
    index = GRID_INDICES[kind](num_tokens, t, rng)
    # One rounding only: k * L is exact, so n = L gives exact integers.
    return torch.from_numpy(index * context_len / num_tokens)


def draw_document_positions(
    kind: str,
    lengths: Sequence[int],
    context_len: int,
    t: float,
    generators: Iterable[np.random.Generator],
    *,
    mix_random: float = 0.25,
    max_chunks: int = 8,
) -> Float64[Tensor, " n"]:
    """Draw the positions of a row of packed documents: each restarts at 0 and has its own generator.

    A document of m of the row's n tokens spans m * t * L / n on its own grid, so its spacing is that of a whole row.
    """
    row_len = sum(lengths)
    parts = [
        draw_positions(kind, m, context_len * m / row_len, t, rng, mix_random=mix_random, max_chunks=max_chunks)
        for m, rng in zip(lengths, generators, strict=True)
    ]
    return torch.cat(parts)


def random_indices(num_tokens: int, t: float, rng: np.random.Generator) -> np.ndarray:
    """Choose the first and last grid point, and a random ordered subset of those between."""
    if num_tokens == 1:
        return np.zeros(1, dtype=np.int64)
    # Both ends are fixed, so that every row reaches the longest distance that t allows.
    last = math.floor(num_tokens * t) - 1
    return np.concatenate(([0], 1 + _subset(rng, last - 1, num_tokens - 2), [last]))


def uniform_indices(num_tokens: int, t: float, rng: np.random.Generator) -> np.ndarray:
    """Choose every t-th grid point, rounded down: even to within one grid step. Draws nothing."""
    indices: np.ndarray = np.floor(np.arange(num_tokens) * t).astype(np.int64)
    return indices


def skip_positions(
    num_tokens: int, context_len: float, t: float, rng: np.random.Generator, max_chunks: int
) -> np.ndarray:
    """Draw chunks with spacing min(1, t * L / n) and integer gaps, whose running sums are uniform.

    Chunk lengths are a random composition of n. Without room (t * L <= n) the row is evenly spaced.
    """
    spacing = min(1.0, t * context_len / num_tokens)
    # Integer gaps keep positions integral, as they are at inference.
    room = max(0, math.floor(t * context_len) - num_tokens) if spacing == 1.0 else 0
    most = min(max_chunks, num_tokens)
    num_chunks = int(rng.integers(min(2, most), most, endpoint=True))
    # Cut points without repetition give every composition the same probability.
    starts = 1 + _subset(rng, num_tokens - 1, num_chunks - 1)
    # Sorted uniform draws as cumulative gaps: every chunk can reach every distance within the room.
    shifts = np.sort(rng.integers(0, room, num_chunks - 1, endpoint=True))
    gaps = np.zeros(num_tokens)
    gaps[starts] = np.diff(shifts, prepend=0)
    positions: np.ndarray = np.arange(num_tokens) * spacing + gaps.cumsum()
    return positions


def _subset(rng: np.random.Generator, population: int, size: int) -> np.ndarray:
    """Draw `size` distinct members of 0 .. population - 1, ascending."""
    # `shuffle=False` is faster and, once sorted, equivalent.
    return np.sort(rng.choice(population, size, replace=False, shuffle=False))


GRID_INDICES: dict[str, Callable[[int, float, np.random.Generator], np.ndarray]] = {
    "random": random_indices,
    "uniform": uniform_indices,
}


def _check(kind: str, num_tokens: int, context_len: float, t: float, mix_random: float, max_chunks: int) -> None:
    if kind not in (*GRID_INDICES, "skip", "mix", "plain"):
        raise ValueError(f"positions={kind}: one of random, uniform, skip, mix, plain")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: must be at least 1")
    if not context_len > 0:
        raise ValueError(f"context_len={context_len}: must be greater than 0")
    if not (t >= 1 and math.isfinite(t)):
        raise ValueError(f"t={t}: a scale factor must be at least 1")
    if not 0 <= mix_random <= 1:
        raise ValueError(f"mix_random={mix_random}: must be a probability between 0 and 1")
    if max_chunks < 2:
        raise ValueError(f"max_chunks={max_chunks}: must be at least 2")
