"""Loss of a micro batch: mean nll of its scored tokens, from all logits at once or tile by tile.

Both variants take targets that are already shifted. Under sequence parallelism, a rank's last token predicts the first
token of the next rank, which it could not find by shifting its own labels.
Shapes: `B` rows, `S` tokens, `E` width, `V` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from clex_train.engine.tiled_loss import IGNORED, Logits, implementation
from clex_train.utils.protocols import CausalLM, Engine

if TYPE_CHECKING:
    from clex_train.config.engine import EngineConfig

NLL = "nll_targets"
"""Keyword argument that `install_tiles` adds to a model: with it, a call returns the loss instead of logits."""


class Loss(Protocol):
    """Computes the mean nll [] of the scored `targets` int64 [B, S]; 0 when none is. `model` may be an engine."""

    def __call__(self, model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor: ...


def choose_loss(engine: EngineConfig) -> Loss:
    """Choose the loss function by `engine.tiled_loss`."""
    return loss_from_logits if engine.tiled_loss is None else loss_in_tiles


def shifted(labels: Tensor) -> Tensor:
    """Shift `labels` [B, S] of whole rows by one, so that each token's target is the next one; ignore the last."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def loss_from_logits(model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor:
    """Compute the loss from the logits [B, S, V] of the whole micro batch, plus the router's loss if there is one."""
    output = model(use_cache=False, **inputs)
    # float32: a bf16 log-sum-exp over a large vocabulary loses the differences that the loss consists of.
    total = nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    # Not `reduction="mean"`, which is 0 / 0 for a micro batch without scored tokens.
    loss = total / num_scored(targets)
    balance = getattr(output, "aux_loss", None)
    return loss if balance is None else loss + _balance_weight(model) * balance


def loss_in_tiles(model: CausalLM | Engine, targets: Tensor, **inputs: Any) -> Tensor:
    """Compute the loss tile by tile, with a model that `install_tiles` has prepared."""
    loss: Tensor = model(use_cache=False, **{NLL: targets}, **inputs)
    return loss


def install_tiles(model: CausalLM, tile_len: int) -> None:
    """Make a causal LM return the tiled loss when called with the argument `NLL`; other calls are unchanged.

    `tile_len` in tokens.
    """
    own, decoder, head = model.forward, model.base_model, model.get_output_embeddings()
    logits = Logits.from_config(model.config)

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
        # Call the output layer as a module: ZeRO-3's hooks then gather its weights, once for all tiles.
        with replaced_forward(head, functools.partial(score, targets)):
            return head(hidden)

    model.__dict__["forward"] = forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward on this instance inside the block; its hooks still run."""
    # Something else, such as Liger, may have replaced it on the instance already.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def num_scored(targets: Tensor) -> Tensor:
    """Count the scored tokens, at least 1, as a device tensor."""
    # Not an int: reading it would synchronize the host in every micro batch.
    return targets.ne(IGNORED).sum().clamp(min=1)


def _balance_weight(model: CausalLM | Engine) -> float:
    # An engine has the model as `module`, and a `config` of its own, which is DeepSpeed's.
    unwrapped: Any = getattr(model, "module", model)
    return float(unwrapped.config.get_text_config().router_aux_loss_coef)
