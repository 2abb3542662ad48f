"""The output layer of a causal LM in tiles: a chunk is scored without its logits ever being there at once.

    nll_i = logsumexp(W h_i + b) - (W h_i + b)[target_i]

Shapes: `B` rows, `S` tokens of a chunk, `V` vocabulary, `E` width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.engine.tiled_loss import logits_of, nll_in_place
from clex_train.engine.token_loss import standing_in

TILE_ELEMENTS = 2**20
"""Logits that exist at a time, in float32: 4 MiB, about what stays in a CPU's cache between its passes."""
TILE_ELEMENTS_ON_GPU = 2**26
"""256 MiB: the weights of the output layer are read anew for each tile, and should be few times."""
SCORER = "scoring_head"


@contextmanager
def tiled_head(model: nn.Module, device: torch.device) -> Iterator[None]:
    """`score_chunk` of this model makes one tile of logits at a time inside.

    Only where the model's logits are what its output layer makes, which a forward of two tokens tells; one that goes on
    with them (soft-capping, scaling) is left alone. Collective.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or not _returns_what_it_makes(model, head, device):
        yield
        return
    scorer = _TiledHead(head)
    model.__dict__[SCORER] = scorer
    try:
        with standing_in(head, scorer.forward):
            yield
    finally:
        del model.__dict__[SCORER]


def score_chunk(model: nn.Module, targets: Tensor, **inputs: Any) -> Tensor:
    """nll float32 [B, S'] of `targets` [B, S'], which the first S' of the inputs predict."""
    scorer = model.__dict__.get(SCORER)
    if scorer is None:
        return token_nll(model(**inputs).logits[:, : targets.shape[1]], targets)
    scorer.targets = targets
    try:
        nll: Tensor = model(**inputs).logits.squeeze(-1)
        return nll
    finally:
        scorer.targets = None


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], float32 [B, S], for `logits` [B, S, V] and `targets` int64 [B, S].

    In float32 at least, and tile by tile, so that wide vocabularies in bf16 are not copied whole.
    """
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    for tile in _tiles(targets, logits.shape[2]):
        scores = logits[:, tile].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        nll[:, tile] = nll_in_place(scores, targets[:, tile])[0]
    return nll


class _TiledHead:
    """Stands in for the `forward` of an output layer: its logits, or the nll of `targets` while there are some."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.targets: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [B, S, V] of `hidden` [B, S, E]; or nll [B, S', 1] of `targets` [B, S']."""
        weight, bias = self.head.weight, self.head.bias
        if self.targets is None:
            return nn.functional.linear(hidden, weight, bias)
        nll = torch.empty(self.targets.shape, dtype=torch.float32, device=hidden.device)
        for tile in _tiles(self.targets, len(weight)):
            targets = self.targets[:, tile]
            scores = logits_of(hidden[:, tile][:, : targets.shape[1]], weight, bias)
            nll[:, tile] = nll_in_place(scores, targets)[0]
        return nll.unsqueeze(-1)


def _tiles(targets: Tensor, vocab_size: int) -> Iterator[slice]:
    """Parts of the columns of `targets` [B, S] whose logits are at most a tile."""
    elements = TILE_ELEMENTS_ON_GPU if targets.is_cuda else TILE_ELEMENTS
    columns = max(1, elements // (targets.shape[0] * vocab_size))
    for start in range(0, targets.shape[1], columns):
        yield slice(start, start + columns)


def _returns_what_it_makes(model: nn.Module, head: nn.Module, device: torch.device) -> bool:
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda *call: made.append(call[2].clone()))
    try:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return len(made) == 1 and made[0].shape == logits.shape and torch.equal(made[0], logits)
