"""Log-scaling of each query by the keys that it sees itself, instead of one factor for the whole call.

    q_i <- q_i max(1, log(n_i) / log(L)),    n_i keys visible to query i

A query then has the same factor in a long prefill, in chunks and token by token, so a cached call equals an uncached
one. Multiplying the query is multiplying its logits. Qwen's first models scale so in inference alone
(arXiv 2309.16609, `use_logn_attn`); the idea is from arXiv 2202.12172. The query is multiplied where a layer hands it
to its attention function: after rotation, norms and clipping, in every family and back end.
Shapes: `B` batch, `H` heads, `S` new tokens, `D` head dim.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from clex_train.attention.kv_cache import LibraryChanged
from clex_train.attention.layer_probe import layer_type
from clex_train.attention.visible_keys import NewTokens, ScaledAttention, SubscribeCalls, model_type, scaled_attention
from clex_train.utils.errors import ConfigError, require

PREFIX = "token_scaled_"
"""Before the name of the model's own attention function: the same function, with scaled queries."""
ATTRIBUTE = "token_log_scaling"
FUNCTIONS, EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
"""Names by which a family's code finds its attention function."""
POLICIES = {"token_eval": False, "token": True}
"""True for a policy that applies to a model in training mode too."""


def token_factors(num_visible: Int64[Tensor, "*B S"], context_len: int) -> Float[Tensor, "*B S"]:
    """Return max(1, log(n) / log(L)) of every query, in float64."""
    # Padding may see no key at all: the logarithm of 0 is below every bound.
    return (num_visible.double().log() / math.log(context_len)).clamp(min=1.0)


class TokenScaling:
    """Per-token log-scaling of one model, updated before each call; created by `install_log_scaling`."""

    def __init__(self, model: nn.Module, policy: str, context_len: int) -> None:
        self.model, self.policy, self.context_len = model, policy, context_len
        self._call: NewTokens | None = None
        self._factors: dict[int, Tensor] = {}
        found = scaled_attention(model)
        for each in found:
            _require_supported(model, each.module)
        self._layers = [_Layer(self, each) for each in found]
        self._unsubscribe: Any = None

    def follow(self, call: NewTokens) -> None:
        """Scale the queries of `call` from now on, through a backward pass that computes layers again."""
        applies = POLICIES[self.policy] or not self.model.training
        self._call, self._factors = call if applies else None, {}

    def subscribe(self, on_call: SubscribeCalls) -> "TokenScaling":
        """Follow every call that `on_call` announces, such as `RotaryHandle.on_call`."""
        self._unsubscribe = on_call(self.follow)
        return self

    def undo(self) -> None:
        """Stop following and remove every hook."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        for layer in self._layers:
            layer.remove()
        self._call, self._factors = None, {}

    def limit(self, attention: ScaledAttention) -> int | None:
        """Return the most keys that a query of the call sees in a layer; None if no factor exceeds 1."""
        if self._call is None:
            return None
        limit = attention.limit(self._call.most_visible)
        # Within L every factor is 1: nothing is multiplied, and the result is that of the plain model to the bit.
        return limit if limit > self.context_len else None

    def factors(self, limit: int, device: torch.device) -> Float[Tensor, "*B S"]:
        """Return the factors of the call's queries in layers that show at most `limit` keys."""
        assert self._call is not None
        # All layers with the same window share one tensor, and all heads.
        known = self._factors.get(limit)
        if known is None or known.device != device:
            seen = self._call.count_visible().clamp(max=limit)
            known = self._factors[limit] = token_factors(seen.to(device), self.context_len)
        return known


@dataclass(eq=False)
class _Layer:
    """Hooks of one attention module.

    They rename its attention function during its own forward alone. Masks are built from the original name, and
    whatever else replaces the function (Ulysses, LM-Infinite, attention in chunks) goes on doing so.
    """

    scaling: TokenScaling
    attention: ScaledAttention
    removals: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        module: nn.Module = self.attention.module
        setattr(module, ATTRIBUTE, self)
        self.removals = [
            module.register_forward_pre_hook(self.before_call),
            # Also after an error, such as the one by which activation checkpointing ends a recomputation.
            module.register_forward_hook(self.after_call, always_call=True),
        ]

    def remove(self) -> None:
        for removal in self.removals:
            removal.remove()
        self.attention.module.__dict__.pop(ATTRIBUTE, None)

    def before_call(self, module: Any, args: Any) -> None:
        if self.scaling.limit(self.attention) is None:
            return
        name = PREFIX + _own_name(module.config)
        if name not in _namespace(module)[FUNCTIONS]:
            AttentionInterface.register(name, token_scaled_attention)
        module.config._attn_implementation = name

    def after_call(self, module: Any, args: Any, output: Any) -> None:
        name = module.config._attn_implementation
        if not name.startswith(PREFIX):
            return
        module.config._attn_implementation = _own_name(module.config)
        # After an error there is no output, and the error itself is the message.
        if output is not None:
            raise LibraryChanged(f"{type(module).__name__} attends without its attention function")

    def scale(self, query: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H S D"]:
        limit = self.scaling.limit(self.attention)
        assert limit is not None, "the attention function is renamed only where some factor exceeds 1"
        factors = self.scaling.factors(limit, query.device)[:, None, :, None]
        # In float32 and rounded once; float64 would be slow on a GPU for a bfloat16 query.
        return (query * factors.to(torch.promote_types(query.dtype, torch.float32))).to(query.dtype)


def token_scaled_attention(module: Any, query: Float[Tensor, "B H S D"], *args: Any, **options: Any) -> Any:
    """Attend by the model's own attention function, with every query times its factor."""
    layer: _Layer = getattr(module, ATTRIBUTE)
    name = _own_name(module.config)
    # Some functions look up their variant by this name, or replace it for a while themselves.
    module.config._attn_implementation = name
    # From the namespace of the family's code: eager attention is a function of each family.
    names = _namespace(module)
    attention = names[FUNCTIONS].get_interface(name, names[EAGER])
    return attention(module, layer.scale(query), *args, **options)


def _own_name(config: Any) -> str:
    return str(config._attn_implementation).removeprefix(PREFIX)


def _namespace(module: Any) -> dict[str, Any]:
    """Return the globals of the code in which a module looks up its attention function."""
    names: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return names


def _require_supported(model: nn.Module, module: Any) -> None:
    """Raise `ConfigError` for attention whose queries cannot be reached, or whose keys cannot be counted."""
    forward = inspect.unwrap(type(module).forward)
    finds_function = {FUNCTIONS, EAGER} <= set(forward.__code__.co_names) and hasattr(module, "config")
    remedy = "use eval, always or off"
    require(
        finds_function,
        "log_scale",
        None,
        f"the attention of model_type={model_type(model)} is not reached through transformers' attention interface, "
        f"which scaling a query by its position needs; {remedy}",
    )
    if layer_type(module) == "chunked_attention":
        raise ConfigError(
            "log_scale",
            None,
            f"model_type={model_type(model)} attends in chunks, in which the number of visible keys starts over; "
            f"{remedy}",
        )
