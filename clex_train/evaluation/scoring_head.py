"""Tiled output layer for scoring: the logits of a chunk never exist at once.

    nll_i = logsumexp(W h_i + b) - (W h_i + b)[target_i]

Shapes: `B` rows, `S` tokens of a chunk, `V` vocabulary, `E` width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.engine.tiled_loss import logits_of, nll_in_place
from clex_train.engine.token_loss import replaced_forward

TILE_ELEMENTS = 2**20
"""Logits of a tile on a CPU: 4 MiB in float32, which stay in its cache between the passes over them."""
TILE_ELEMENTS_ON_GPU = 2**26
"""Logits of a tile on a GPU: 256 MiB, because each tile reads the whole output layer again."""
LEAST_TOKENS = 128
"""Tokens of a tile at least: below, a product of a large vocabulary spends its time on reading the weights."""
SCORER = "scoring_head"


@contextmanager
def tiled_head(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Make `score_chunk` of this model compute one tile of logits at a time inside the block. Collective."""
    # Only if the model returns the output layer's product unchanged. With soft-capping or scaling after it, the nll
    # cannot be computed inside the layer.
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or not _returns_what_it_makes(model, head, device):
        yield
        return
    scorer = _TiledHead(head)
    model.__dict__[SCORER] = scorer
    try:
        with replaced_forward(head, scorer.forward):
            yield
    finally:
        del model.__dict__[SCORER]


def score_chunk(model: nn.Module, targets: Tensor, **inputs: Any) -> Tensor:
    """Compute the nll float32 [B, S'] of `targets` [B, S'], the next tokens of the first S' inputs."""
    scorer = model.__dict__.get(SCORER)
    if scorer is None:
        return token_nll(model(**inputs).logits[:, : targets.shape[1]], targets)
    # The model does not pass targets on to its output layer, so they take this way around it.
    scorer.targets = targets
    try:
        nll: Tensor = model(**inputs).logits.squeeze(-1)
        return nll
    finally:
        scorer.targets = None


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute -log softmax(logits)[target], float32 [B, S], for `logits` [B, S, V] and `targets` int64 [B, S]."""
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    for tile in _tiles(targets, logits.shape[2]):
        # Tile by tile, so that bf16 logits are never copied to float32 as a whole.
        scores = logits[:, tile].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        nll[:, tile] = nll_in_place(scores, targets[:, tile])[0]
    return nll


class _TiledHead:
    """Replacement for an output layer's `forward`: returns logits, or the nll of `targets` while they are set."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.targets: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, S, V] for `hidden` [B, S, E], or the nll [B, S', 1] of `targets` [B, S']."""
        weight, bias = self.head.weight, self.head.bias
        if self.targets is None:
            return nn.functional.linear(hidden, weight, bias)
        nll = torch.empty(self.targets.shape, dtype=torch.float32, device=hidden.device)
        for tile in _tiles(self.targets, len(weight)):
            targets = self.targets[:, tile]
            scores = logits_of(hidden[:, tile][:, : targets.shape[1]], weight, bias)
            nll[:, tile] = nll_in_place(scores, targets)[0]
        # The shape of logits over a vocabulary of one, which the model's own code passes through.
        return nll.unsqueeze(-1)


def _tiles(targets: Tensor, vocab_size: int) -> Iterator[slice]:
    """Yield column ranges of `targets` [B, S] whose logits fit into a tile."""
    elements = TILE_ELEMENTS_ON_GPU if targets.is_cuda else TILE_ELEMENTS
    tokens = max(LEAST_TOKENS, elements // vocab_size)
    columns = max(1, tokens // targets.shape[0])
    for start in range(0, targets.shape[1], columns):
        yield slice(start, start + columns)


def _returns_what_it_makes(model: nn.Module, head: nn.Module, device: torch.device) -> bool:
    # Copied in the hook: some families scale their logits in place.
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda *call: made.append(call[2].clone()))
    try:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return len(made) == 1 and made[0].shape == logits.shape and torch.equal(made[0], logits)
