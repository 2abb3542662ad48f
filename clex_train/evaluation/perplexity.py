"""Negative log-likelihood per token of windows under a causal language model, exact in bounded memory.

    nll_i = -log p(token_i | token_0 .. token_{i-1})            perplexity = exp(mean nll over the scored tokens)

A span passes through the KV cache in chunks, and the output layer in tiles (`scoring_head`). The two ways to read
differ in the scale factor alone: `one_shot` holds t at what the whole span needs; `chunked` (the official CLEX
evaluation) lets t grow with every L tokens. Which spans of a window are read is the protocol's (`protocols`). Shapes:
`B` spans, `N` tokens of a span, `S` of a chunk, `V` vocabulary, `L` tokens the base model was trained on.
"""

import math
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.attention import kv_cache
from clex_train.evaluation.results import Score
from clex_train.evaluation.scoring_head import score_chunk
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.preallocated_cache import new_cache
from clex_train.utils import distributed, log

logger = log.get(__name__)

Advance = Callable[[int], None]
"""Called after each chunk with the tokens of a span read so far."""


class Predict(typing.Protocol):
    """A way to read a span: tokens int64 [B, N] -> nll float32 [B, N]."""

    def __call__(
        self,
        model: nn.Module,
        handle: RotaryHandle,
        tokens: Tensor,
        chunk_len: int,
        cache_on_host: bool = False,
        advance: Advance = ...,
    ) -> Tensor: ...


def ignore(num_tokens: int) -> None:
    """Watch no progress."""


def one_shot(
    model: nn.Module,
    handle: RotaryHandle,
    tokens: Tensor,
    chunk_len: int,
    cache_on_host: bool = False,
    advance: Advance = ignore,
) -> Tensor:
    """Return nll float32 [B, N] of `tokens` int64 [B, N] at the least t >= N / L throughout; the first column is 0.

    The numbers of one forward over the span up to rounding: `chunk_len` and `cache_on_host` bound the memory. Raises
    `ValueError` if the handle's table ends before N tokens.
    """
    nll = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    cache = _new_cache(model, tokens, chunk_len, cache_on_host)
    with handle.fixed(tokens.shape[1]):
        _feed(model, tokens, 0, tokens.shape[1], chunk_len, cache, nll, advance)
    return nll


def chunked(
    model: nn.Module,
    handle: RotaryHandle,
    tokens: Tensor,
    chunk_len: int,
    cache_on_host: bool = False,
    advance: Advance = ignore,
) -> Tensor:
    """Return nll float32 [B, N] of `tokens` int64 [B, N], each L tokens read at the t that all so far need.

    Cached keys follow t, hidden states stay as they were computed. The official code does not score the first token
    of each L: leave multiples of L out of the scored tokens to compare with it. `chunk_len` and `cache_on_host`
    bound the memory only.
    """
    nll = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    cache = _new_cache(model, tokens, min(chunk_len, handle.context_len), cache_on_host)
    for start in range(0, tokens.shape[1], handle.context_len):
        stop = min(start + handle.context_len, tokens.shape[1])
        with handle.fixed(stop):
            _feed(model, tokens, start, stop, chunk_len, cache, nll, advance)
    return nll


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode is put back.

    `no_grad` and not `inference_mode`: ZeRO-3 fills parameters in place, and inference tensors could not train again.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _new_cache(model: nn.Module, tokens: Tensor, chunk_len: int, on_host: bool) -> Any:
    """Room for all tokens [B, N]; None where a single forward reads them."""
    return new_cache(model, tokens.shape[1], on_host) if tokens.shape[1] > chunk_len else None


def _feed(
    model: nn.Module,
    tokens: Tensor,
    start: int,
    stop: int,
    chunk_len: int,
    cache: Any,
    nll: Tensor,
    advance: Advance,
) -> None:
    """Read tokens [start, stop) in chunks through the cache, write what they predict (one further) into `nll`."""
    for first in range(start, stop, chunk_len):
        last = min(first + chunk_len, stop)
        targets = tokens[:, first + 1 : last + 1]
        inputs = {
            "input_ids": tokens[:, first:last],
            "use_cache": cache is not None,
            **kv_cache.as_kwargs(model, cache),
        }
        nll[:, first + 1 : last + 1] = score_chunk(model, targets, **inputs)
        advance(last)


def warn_of_overflow(scores: Iterable[Score]) -> None:
    """Name on rank 0 the cells whose perplexity is not finite: nan or inf in tables, null in files."""
    for score in scores if distributed.is_main() else ():
        if not math.isfinite(score.perplexity):
            logger.warning(
                "%s: the perplexity is %s: activations or losses overflow in %d tokens; try engine.precision=fp32, or "
                "leave the cell out",
                score.key,
                score.perplexity,
                score.length,
            )
