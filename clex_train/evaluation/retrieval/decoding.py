"""Greedy decoding after a long prompt, in bounded memory.

The prompt goes through the KV cache in chunks, and so does what is generated, token by token. Shapes: `N` tokens of
the prompt, `G` generated ones.
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
    """int64 [G]: the `num_new` likeliest next tokens after `prompt` int64 [N], whatever is among them.

    The prompt is read in `num_chunks` pieces of nearly equal length (fewer when it has fewer tokens), which bounds the
    memory and does not change the result beyond rounding. A number of pieces, not their length, so that prompts of
    nearly equal length need equally many forwards: G - 1 more than there are pieces. `new_cache` makes the cache; by
    default the model does;
    `advance` hears after each piece how many tokens have been read.
    """
    cache = new_cache() if new_cache else None
    token, num_read = prompt[:0], 0
    for chunk in prompt.tensor_split(num_chunks):
        token, cache = _next_token(model, chunk, cache)
        num_read += len(chunk)
        advance(num_read)
    generated = [token]
    for _ in range(num_new - 1):
        token, cache = _next_token(model, token, cache)
        generated.append(token)
    return torch.cat(generated)


def _next_token(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The likeliest token [1] after `tokens` [S] and those in the cache, and the grown cache."""
    output = model(input_ids=tokens[None], use_cache=True, **kv_cache.as_kwargs(model, cache))
    return output.logits[0, -1:].argmax(dim=-1), kv_cache.require_in_output(output)
