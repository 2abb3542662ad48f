"""Log-scaling: attention logits times log(n) / log(L), so that their entropy does not grow with the context.

One factor for a whole call, put on the softmax scale that every attention back end of transformers reads from the
module's `scaling` (not on cos and sin, which would reach only the rotary part of a head). Where a mask shows a query no
more than some number of keys, that number stands for a larger n.
n tokens of the call (cached keys and new ones; in training those of a row), L the context the base was trained on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from clex_train.attention.layer_probe import layer_window

MOST_VISIBLE = "most_visible_keys"
"""Attribute of an attention module by which a mask says how many keys a query sees at most."""

Subscribe = Callable[[Callable[[int], None]], Callable[[], None]]
Policy = Callable[[int, int, bool], float]


def clamped_factor(num_tokens: int, context_len: int) -> float:
    """log(n) / log(L) for n > L, else 1."""
    return max(1.0, math.log(num_tokens) / math.log(context_len))


def official_factor(num_tokens: int, context_len: int) -> float:
    """log(n) / log(L) for every n, as the released checkpoints have it: below 1 for n < L and 0 for n = 1."""
    return math.log(num_tokens) / math.log(context_len)


POLICIES: dict[str, Policy] = {
    "off": lambda num_tokens, context_len, training: 1.0,
    "eval": lambda num_tokens, context_len, training: 1.0 if training else clamped_factor(num_tokens, context_len),
    "always": lambda num_tokens, context_len, training: clamped_factor(num_tokens, context_len),
    "official": lambda num_tokens, context_len, training: official_factor(num_tokens, context_len),
}


@dataclass(frozen=True)
class _ScaledAttention:
    """An attention module, its own softmax scale, and how many keys it sees at most."""

    module: Any
    scaling: float
    window: int | None


class LogScaling:
    """Log-scaling of one model, following the lengths it is told; made by `install_log_scaling`."""

    def __init__(self, model: nn.Module, policy: str, context_len: int) -> None:
        self.model, self.policy, self.context_len = model, policy, context_len
        self.factor = 1.0
        self._most_visible: int | None = None
        self._rule = POLICIES[policy]
        self._attention = [] if policy == "off" else _attention_modules(model)
        self._unsubscribe: Callable[[], None] | None = None

    def follow(self, num_tokens: int) -> None:
        """Set the softmax scales for a call of `num_tokens` tokens."""
        factor = self._rule(num_tokens, self.context_len, self.model.training)
        # A mask is on all layers or on none, so the first one tells whether it came or went.
        most_visible = getattr(self._attention[0].module, MOST_VISIBLE, None) if self._attention else None
        if factor == self.factor and most_visible == self._most_visible:
            return
        self.factor, self._most_visible = factor, most_visible
        for item in self._attention:
            limits = (item.window, getattr(item.module, MOST_VISIBLE, None))
            seen = min([num_tokens, *(limit for limit in limits if limit is not None)])
            item.module.scaling = item.scaling * self._rule(seen, self.context_len, self.model.training)

    def subscribe(self, on_length: Subscribe) -> "LogScaling":
        """Follow every length that `on_length` announces, such as `RotaryHandle.on_length`."""
        self._unsubscribe = on_length(self.follow)
        return self

    def undo(self) -> None:
        """Stop following and restore every softmax scale to the bit."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        self.factor, self._most_visible = 1.0, None
        for item in self._attention:
            item.module.scaling = item.scaling


def install_log_scaling(model: nn.Module, policy: str, context_len: int, on_length: Subscribe) -> LogScaling:
    """Scale the attention logits of `model` by `policy`: `off`, `eval`, `always` or `official`.

        install_log_scaling(model, "eval", handle.context_len, handle.on_length)

    `eval` leaves a model in training mode alone. Layers with a sliding window count no more keys than the window.
    `ValueError` for an unknown policy, L < 2, or a model whose attention takes its scale from elsewhere.
    """
    if policy not in POLICIES:
        raise ValueError(f"log_scale={policy}: one of {', '.join(POLICIES)}")
    if context_len < 2:
        raise ValueError(f"context_len={context_len}: log-scaling divides by log(L), which needs L of at least 2")
    return LogScaling(model, policy, context_len).subscribe(on_length)


def _attention_modules(model: nn.Module) -> list[_ScaledAttention]:
    modules: list[Any] = list(model.modules())
    found = [
        _ScaledAttention(module, module.scaling, layer_window(module))
        for module in modules
        if isinstance(getattr(module, "scaling", None), (float, int)) and hasattr(module, "layer_idx")
    ]
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"log_scale: the attention of model_type={kind} does not read its softmax scale from `scaling`; "
            "use scaling.log_scale=off"
        )
    return found
