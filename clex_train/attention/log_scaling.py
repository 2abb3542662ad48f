"""Log-scaling: attention logits times log(n) / log(L), so that their entropy does not grow with the context.

The factor is one number per call, applied to the softmax scale that transformers' attention functions read from the
module's `scaling`. `n` counts the tokens of the call (cached keys plus new ones; in training those of a row), or the
most keys that a mask shows a query where that is fewer. `L` is the context length the base model was trained on.
Policies that count for each token by itself are in `attention.token_scaling`.
"""

import math
from collections.abc import Callable

from torch import nn

from clex_train.attention import token_scaling
from clex_train.attention.token_scaling import TokenScaling
from clex_train.attention.visible_keys import MOST_VISIBLE, ScaledAttention, SubscribeCalls, scaled_attention
from clex_train.utils.errors import ConfigError

Subscribe = Callable[[Callable[[int], None]], Callable[[], None]]
Policy = Callable[[int, int, bool], float]


def clamped_factor(num_tokens: int, context_len: int) -> float:
    """Return log(n) / log(L) for n > L, else 1."""
    return max(1.0, math.log(num_tokens) / math.log(context_len))


def official_factor(num_tokens: int, context_len: int) -> float:
    """Return log(n) / log(L) for every n, as the released checkpoints do: below 1 for n < L and 0 for n = 1."""
    return math.log(num_tokens) / math.log(context_len)


POLICIES: dict[str, Policy] = {
    "off": lambda num_tokens, context_len, training: 1.0,
    "eval": lambda num_tokens, context_len, training: 1.0 if training else clamped_factor(num_tokens, context_len),
    "always": lambda num_tokens, context_len, training: clamped_factor(num_tokens, context_len),
    "official": lambda num_tokens, context_len, training: official_factor(num_tokens, context_len),
}


class LogScaling:
    """Log-scaling of one model, updated before each call; created by `install_log_scaling`."""

    def __init__(self, model: nn.Module, policy: str, context_len: int) -> None:
        self.model, self.policy, self.context_len = model, policy, context_len
        self.factor = 1.0
        self._most_visible: int | None = None
        self._rule = POLICIES[policy]
        # Scale the softmax, not cos and sin: those would reach only the rotary part of a head.
        self._attention: list[ScaledAttention] = [] if policy == "off" else scaled_attention(model)
        self._unsubscribe: Callable[[], None] | None = None

    def follow(self, num_tokens: int) -> None:
        """Set the softmax scales for a call of `num_tokens` tokens."""
        factor = self._rule(num_tokens, self.context_len, self.model.training)
        # LM-Infinite masks all layers or none, so the first layer shows whether a mask was installed or removed.
        most_visible = getattr(self._attention[0].module, MOST_VISIBLE, None) if self._attention else None
        # Decoding calls this for every token; below L the factor stays 1 and nothing needs writing.
        if factor == self.factor and most_visible == self._most_visible:
            return
        self.factor, self._most_visible = factor, most_visible
        for item in self._attention:
            seen = item.limit(num_tokens)
            # Multiply the saved original, so that rounding does not accumulate over calls.
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


def install_log_scaling(
    model: nn.Module,
    policy: str,
    context_len: int,
    on_length: Subscribe,
    on_call: SubscribeCalls | None = None,
) -> LogScaling | TokenScaling:
    """Scale the attention logits of `model` by `policy`: `off`, `eval`, `always`, `official`, `token_eval` or `token`.

        install_log_scaling(model, "eval", handle.context_len, handle.on_length, handle.on_call)

    `eval` and `token_eval` skip a model in training mode. A layer with a sliding window counts no more keys than its
    window. `token_eval` and `token` follow `on_call`, the others `on_length`.

    Raises:
        ValueError: unknown policy, or one that needs `on_call`.
        ConfigError: L < 2, or attention that does not read its scale from `scaling`; with `token_eval` and `token` also
            attention that bypasses transformers' interface, or attends in chunks.
    """
    known = [*POLICIES, *token_scaling.POLICIES]
    if policy not in known:
        raise ValueError(f"log_scale={policy}: one of {', '.join(known)}")
    if context_len < 2:
        raise ConfigError("context_len", context_len, "log-scaling divides by log(L), which needs L of at least 2")
    if policy in POLICIES:
        return LogScaling(model, policy, context_len).subscribe(on_length)
    if on_call is None:
        raise ValueError(f"log_scale={policy}: counts the keys of each token, so pass on_call")
    return TokenScaling(model, policy, context_len).subscribe(on_call)
