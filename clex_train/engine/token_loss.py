"""The loss of a micro-batch: the mean nll of its scored tokens, from all logits at once or from a tile of them.

Both take targets that are shifted already, so that a rank which holds a part of a row is told the token behind it.
Shapes: `B` rows, `S` tokens, `E` width, `V` vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from clex_train.config.engine import EngineConfig
from clex_train.engine.tiled_loss import IGNORED, Logits, implementation
from clex_train.utils.protocols import CausalLM, Engine

NLL = "nll_targets"
"""Argument that a model takes after `install_tiles`: the targets of a call that is to return its loss alone."""


class Loss(Protocol):
    """Mean nll [] of `targets` int64 [B, S]: of the scored ones, 0 when none is. `model` may be an engine's."""

    def __call__(self, model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor: ...


def of(engine: EngineConfig) -> Loss:
    """The loss that a configuration asks for."""
    return from_logits if engine.tiled_loss is None else in_tiles


def shifted(labels: Tensor) -> Tensor:
    """What each token of whole rows predicts: `labels` [B, S] one further, nothing at the end of a row."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def from_logits(model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor:
    """From the logits [B, S, V] of the whole micro-batch, in float32; with the router's loss if the model makes one."""
    output = model(use_cache=False, **inputs)
    total = nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss = total / num_scored(targets)
    balance = getattr(output, "aux_loss", None)
    return loss if balance is None else loss + _balance_weight(model) * balance


def in_tiles(model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor:
    """From the hidden states, by a model that `install_tiles` has prepared."""
    loss: Tensor = model(use_cache=False, **{NLL: targets}, **inputs)
    return loss


def install_tiles(model: CausalLM, tile_len: int) -> None:
    """Have a causal LM of transformers take the argument `NLL` and return the loss in tiles of `tile_len` tokens.

    Without the argument it is as before. The output layer runs once a call, as a module, so that sharded weights are
    gathered once and the engine's hooks see it.
    """
    own, decoder, head = model.forward, model.base_model, model.get_output_embeddings()
    logits = Logits.of(model.config)

    def score(targets: Tensor, hidden: Tensor) -> Tensor:
        cross_entropy = implementation(hidden.device, head.bias is not None, logits)
        total = cross_entropy(hidden.flatten(0, 1), targets.flatten(), head.weight, head.bias, tile_len, logits)
        return total / num_scored(targets)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        targets = kwargs.pop(NLL, None)
        if targets is None:
            return own(*args, **kwargs)
        hidden = decoder(*args, **kwargs)[0]
        with standing_in(head, functools.partial(score, targets)):
            return head(hidden)

    model.__dict__["forward"] = forward


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of a module's own, on this instance; its hooks run as ever."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def num_scored(targets: Tensor) -> Tensor:
    """Tokens that are scored, at least 1, as a tensor: asking for the number would make the device wait."""
    return targets.ne(IGNORED).sum().clamp(min=1)


def _balance_weight(model: CausalLM | Engine) -> float:
    # An engine has a `config` too, which is DeepSpeed's.
    unwrapped: Any = getattr(model, "module", model)
    return float(unwrapped.config.get_text_config().router_aux_loss_coef)
