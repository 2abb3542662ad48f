"""Reading of rows whose last tokens alone are scored: the output layer runs on those only.

Shapes: `B` rows, `N` tokens of a row, `A` scored tokens at its end, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clex_train.attention import kv_cache
from clex_train.evaluation.perplexity import Advance, ignore
from clex_train.evaluation.scoring_head import score_chunk, token_nll
from clex_train.rope.preallocated_cache import new_cache

if TYPE_CHECKING:
    from clex_train.rope.patch import RotaryHandle


def read_tails(
    model: nn.Module,
    handle: RotaryHandle,
    tokens: Tensor,
    tail_len: int,
    chunk_len: int,
    cache_on_host: bool = False,
    advance: Advance = ignore,
) -> Tensor:
    """Score the last A tokens of `tokens` int64 [B, N], at the least table t >= N / L, as float32 [B, 2, A].

    The first plane is the nll in nats, the second 1 where the token has the highest logit and 0 elsewhere. `chunk_len`
    and `cache_on_host` only bound the memory. Raises `ConfigError` when the handle's table does not reach N tokens.
    """
    num_tokens = tokens.shape[1]
    # The tail is read one token earlier than it is scored: the last token is predicted and never read.
    prompt_len = num_tokens - 1 - tail_len
    # Always a cache, also for a row that fits one forward: logits of the whole prompt would be computed otherwise.
    cache = new_cache(model, num_tokens, cache_on_host)
    with handle.fixed(num_tokens):
        for first in range(0, prompt_len, chunk_len):
            ids = tokens[:, first : min(first + chunk_len, prompt_len)]
            # No targets, so that the tiled output layer computes no logits for the prompt.
            score_chunk(model, ids[:, :0], input_ids=ids, use_cache=True, **kv_cache.as_kwargs(model, cache))
            advance(first + ids.shape[1])
        ids = tokens[:, prompt_len:-1]
        logits = model(input_ids=ids, use_cache=True, **kv_cache.as_kwargs(model, cache)).logits
    targets = tokens[:, num_tokens - tail_len :]
    hits = logits.argmax(dim=-1) == targets
    return torch.stack([token_nll(logits, targets), hits.to(torch.float32)], dim=1)
