"""Greedy decoding after a long prompt, in bounded memory: chunked prefill, then one token at a time.

Shapes: `N` tokens of the prompt, `G` generated tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.attention import kv_cache
from clex_train.evaluation.perplexity import Advance, ignore


def greedy(
    model: nn.Module,
    prompt: Tensor,
    num_new: int,
    num_chunks: int,
    new_cache: Callable[[], Any] | None = None,
    advance: Advance = ignore,
) -> Tensor:
    """Generate the `num_new` most likely tokens after `prompt` int64 [N], greedily, as int64 [G].

    Does not stop at EOS. The prompt is read in `num_chunks` chunks of nearly equal length, which changes the result
    only by rounding. `new_cache` creates the cache, the model by default. `advance` is called after each chunk with the
    number of tokens read.
    """
    # Every rank must run the same number of forwards under ZeRO-3, hence a fixed number of chunks and no stop at EOS.
    cache = new_cache() if new_cache else None
    token, num_read = prompt[:0], 0
    for chunk in prompt.tensor_split(num_chunks):
        token, cache = _next_token(model, chunk, cache)
        num_read += len(chunk)
        advance(num_read)
    # The prefill has produced the first token already.
    generated = [token]
    for _ in range(num_new - 1):
        token, cache = _next_token(model, token, cache)
        generated.append(token)
    return torch.cat(generated)


def _next_token(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the most likely token [1] after the cache and `tokens` [S], and the extended cache."""
    output = model(input_ids=tokens[None], use_cache=True, **kv_cache.as_kwargs(model, cache))
    return output.logits[0, -1:].argmax(dim=-1), kv_cache.require_in_output(output)
