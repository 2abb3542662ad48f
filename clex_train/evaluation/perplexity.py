"""Negative log-likelihood per token under a causal language model, exact in bounded memory.

    nll_i = -log p(token_i | token_0 .. token_{i-1})            perplexity = exp(mean nll over the scored tokens)

A span goes through the KV cache in chunks, and the output layer in tiles (`scoring_head`). The two reading functions
differ only in the scale factor: `one_shot` keeps t at the value of the whole span, `chunked` (the official CLEX
evaluation) raises t after every L tokens. `protocols` chooses the spans. Shapes: `B` spans, `N` tokens of a span, `S`
tokens of a chunk, `V` vocabulary, `L` context of the base model in tokens.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clex_train.attention import kv_cache
from clex_train.evaluation.scoring_head import score_chunk
from clex_train.rope.preallocated_cache import new_cache
from clex_train.utils import distributed, log

if TYPE_CHECKING:
    from clex_train.evaluation.results import Score
    from clex_train.rope.patch import RotaryHandle

logger = log.get(__name__)

Advance = Callable[[int], None]
"""Called after each chunk with the number of tokens of the span read so far."""


class Predict(typing.Protocol):
    """Reads spans: tokens int64 [B, N] -> nll float32 [B, N]."""

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
    """Do nothing; the default for `advance`."""


def one_shot(
    model: nn.Module,
    handle: RotaryHandle,
    tokens: Tensor,
    chunk_len: int,
    cache_on_host: bool = False,
    advance: Advance = ignore,
) -> Tensor:
    """Compute the nll float32 [B, N] of `tokens` int64 [B, N] with the smallest table t >= N / L; column 0 is 0.

    Equal to one forward over the span up to rounding; `chunk_len` and `cache_on_host` only bound the memory. Raises
    `ConfigError` when the handle's table does not reach N tokens.
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
    """Compute the nll float32 [B, N] of `tokens` int64 [B, N], with t raised after every L tokens; column 0 is 0.

    The official code does not score the first token of every L; leave multiples of L out to compare with it.
    `chunk_len` and `cache_on_host` only bound the memory.
    """
    nll = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    # No chunk may span two values of t.
    cache = _new_cache(model, tokens, min(chunk_len, handle.context_len), cache_on_host)
    for start in range(0, tokens.shape[1], handle.context_len):
        stop = min(start + handle.context_len, tokens.shape[1])
        # The handle rotates cached keys to the new t; hidden states remain as computed at the old one.
        with handle.fixed(stop):
            _feed(model, tokens, start, stop, chunk_len, cache, nll, advance)
    return nll


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode without gradients inside the block."""
    was_training = model.training
    model.eval()
    try:
        # Not `inference_mode`: ZeRO-3 fills parameters in place, and inference tensors could not be trained again.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _new_cache(model: nn.Module, tokens: Tensor, chunk_len: int, on_host: bool) -> Any:
    """Allocate a cache for all tokens [B, N]; None if a single forward reads them."""
    # Allocated once: a growing cache is copied on every chunk, and needs twice its size while it grows.
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
    """Read tokens [start, stop) in chunks through the cache, and write the nll of the tokens after each."""
    # The last chunk predicts one token beyond `stop`; at the end of the span the slices are one shorter.
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
    """Log a warning on rank 0 for each cell whose perplexity is not finite."""
    for score in scores if distributed.is_main() else ():
        if not math.isfinite(score.perplexity):
            logger.warning(
                "%s: the perplexity is %s: activations or losses overflow within %d tokens; try engine.precision=fp32, "
                "or leave the cell out",
                score.key,
                score.perplexity,
                score.length,
            )
