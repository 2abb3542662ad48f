"""Negative log-likelihood per token of windows under a causal language model, exact in bounded memory.

    nll_i = -log p(token_i | token_0 .. token_{i-1})            perplexity = exp(mean nll over the scored tokens)

A span passes through the KV cache in chunks, so that one chunk's logits exist at a time. The two ways to read differ
in the scale factor alone: `one_shot` holds t at what the whole span needs; `chunked` (the official CLEX evaluation)
lets t grow with every L tokens. Which spans of a window are read is the protocol's (`protocols`). Shapes: `B` spans,
`N` tokens of a span, `S` of a chunk, `V` vocabulary, `L` tokens the base model was trained on.
"""

import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.rope.patch import RotaryHandle


class Predict(typing.Protocol):
    """A way to read a span: tokens int64 [B, N] -> nll float32 [B, N]."""

    def __call__(self, model: nn.Module, handle: RotaryHandle, tokens: Tensor, chunk_len: int) -> Tensor: ...


TILE_ELEMENTS = 2**22
"""Logits that are widened to float32 at a time: 16 MiB."""


def one_shot(model: nn.Module, handle: RotaryHandle, tokens: Tensor, chunk_len: int) -> Tensor:
    """nll float32 [B, N] of `tokens` int64 [B, N] at the least t >= N / L throughout; the first column is 0.

    The numbers of one forward over the window, whatever `chunk_len` (which bounds the memory), up to rounding. Raises
    `ValueError` if the handle's table ends before N tokens.
    """
    nll = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    with handle.fixed(tokens.shape[1]):
        _feed(model, tokens, 0, tokens.shape[1], chunk_len, None, nll)
    return nll


def chunked(model: nn.Module, handle: RotaryHandle, tokens: Tensor, chunk_len: int) -> Tensor:
    """nll float32 [B, N] of `tokens` int64 [B, N] read L at a time, each L at the t that all tokens so far need.

    Cached keys follow t, hidden states stay as they were computed. The official code does not score the first token
    of each L: leave multiples of L out of the scored tokens to compare with it. `chunk_len` bounds the memory only.
    """
    nll = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    cache: Any = None
    for start in range(0, tokens.shape[1], handle.context_len):
        stop = min(start + handle.context_len, tokens.shape[1])
        with handle.fixed(stop):
            cache = _feed(model, tokens, start, stop, chunk_len, cache, nll)
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


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], float32 [B, S], for `logits` [B, S, V] and `targets` int64 [B, S].

    In float32 at least, and tile by tile, so that wide vocabularies in bf16 are not copied whole.
    """
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    rows = max(1, TILE_ELEMENTS // (logits.shape[0] * logits.shape[2]))
    for start in range(0, targets.shape[1], rows):
        tile = slice(start, start + rows)
        scores = logits[:, tile].to(torch.promote_types(logits.dtype, torch.float32))
        chosen = scores.gather(-1, targets[:, tile, None]).squeeze(-1)
        nll[:, tile] = scores.logsumexp(-1) - chosen
    return nll


def _feed(model: nn.Module, tokens: Tensor, start: int, stop: int, chunk_len: int, cache: Any, nll: Tensor) -> Any:
    """Read tokens [start, stop) in chunks, write what they predict (one token further) into `nll`; the grown cache."""
    for first in range(start, stop, chunk_len):
        last = min(first + chunk_len, stop)
        output = model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        targets = tokens[:, first + 1 : last + 1]
        nll[:, first + 1 : last + 1] = token_nll(output.logits[:, : targets.shape[1]], targets)
        # Otherwise these logits would live through the next forward, beside its own.
        del output
    return cache
