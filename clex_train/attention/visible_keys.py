"""Number of keys that a query sees: by its position, the padding, and the window of its layer.

    n = tokens of its document up to the query, itself included, without padding; at most W under a window of W keys

Log-scaling counts them (`attention.log_scaling`, `attention.token_scaling`).
Shapes: `B` batch, `S` new tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from clex_train.attention.layer_probe import layer_window
from clex_train.utils.errors import ConfigError

MOST_VISIBLE = "most_visible_keys"
"""Attribute of an attention module: the most keys that its mask shows a query."""


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New tokens of one call of a model, and what tells how many keys each of them sees."""

    num_tokens: int
    """n of the whole call: cached keys plus new tokens, in training the tokens of a row."""
    num_new: int
    num_cached: int = 0
    position_ids: Tensor | None = None
    """int [B or 1, S] or several coordinates [C, B, S], as passed by the caller; None for consecutive positions."""
    mask: Any = None
    """`attention_mask` of the call; one of two dimensions [B, T] marks padding with 0."""

    @property
    def most_visible(self) -> int:
        """Upper bound of n of its queries, without reading a tensor."""
        return max(self.num_tokens, self.num_cached + self.num_new)

    def count_visible(self) -> Int64[Tensor, "*B S"]:
        """Return n of each query under full attention; the n of padding has no meaning.

        Raises:
            ValueError: a padding mask that does not cover the cached keys.
        """
        if isinstance(self.mask, Tensor) and self.mask.dim() == 2:
            # Not by positions: without `position_ids`, most families give padding positions too.
            counts = self.mask.ne(0).cumsum(dim=1)[:, self.num_cached : self.num_cached + self.num_new]
            if counts.shape[1] != self.num_new:
                known = self.num_cached + self.num_new
                raise ValueError(f"attention_mask of {self.mask.shape[1]} tokens: cached and new ones are {known}")
            return counts
        if self.position_ids is None:
            return torch.arange(self.num_cached, self.num_cached + self.num_new)[None] + 1
        # The coordinates of a text are equal. Positions restart with each document of a packed row.
        positions = self.position_ids if self.position_ids.dim() == 2 else self.position_ids[0]
        return positions.long() + 1


CallListener = Callable[[NewTokens], None]
SubscribeCalls = Callable[[CallListener], Callable[[], None]]
"""Calls a listener before each call of a model, such as `RotaryHandle.on_call`; returns what ends it."""


@dataclass(frozen=True)
class ScaledAttention:
    """An attention module that reads its softmax scale from `scaling`, with the original scale and the window."""

    module: Any
    scaling: float
    window: int | None

    def limit(self, num_tokens: int) -> int:
        """Return the most keys that a query of a context of `num_tokens` tokens sees."""
        limits = (self.window, getattr(self.module, MOST_VISIBLE, None))
        return min([num_tokens, *(limit for limit in limits if limit is not None)])


def scaled_attention(model: nn.Module) -> list[ScaledAttention]:
    """Find the attention modules with a `scaling`; `ConfigError` names a model type that has none."""
    modules: list[Any] = list(model.modules())
    found = [
        ScaledAttention(module, module.scaling, layer_window(module))
        for module in modules
        # Norms and embeddings may have a `scaling` too; only attention modules carry a layer index.
        if isinstance(getattr(module, "scaling", None), (float, int)) and hasattr(module, "layer_idx")
    ]
    if not found:
        raise ConfigError(
            "log_scale",
            None,
            f"the attention of model_type={model_type(model)} does not read its softmax scale from `scaling`; "
            "use scaling.log_scale=off",
        )
    return found


def model_type(model: nn.Module) -> str:
    """Return the model's family, for messages."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
