"""LM-Infinite on a Hugging Face causal LM: `apply_lm_infinite(model, n_local, n_global)`, and back with `undo()`.

One function is registered with transformers' attention interface, and one in place of its masks that passes the
padding on, so no n x n mask is built. A hook on each attention module has the model rotate by cos = 1, sin = 0:
queries, keys and caches stay unrotated, and `lambda_attention` rotates them by distance with the model's own rotation.
Shapes: `B` batch, `H` heads, `K` key heads, `S` new tokens, `T` keys, `D` head width.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from clex_train import log
from clex_train.attention.lambda_cache import LambdaCache, LambdaCacheLayer, room
from clex_train.attention.lambda_mask import KeyValues, Stream, default_block_len, lambda_attention, rotated_span_len
from clex_train.attention.log_scaling import own_window
from clex_train.attention.padding import inverse, order_to_front, take
from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.attention.rotation import RotationTables, Turn, find_rotary_site, turn_of

NAME = "lm_infinite"
LAYER = "lm_infinite_layer"
SPECTRUM = "lm_infinite_spectrum"
UNSUPPORTED = {
    "cohere2": "its layers with full attention have no positions",
    "hunyuan_v1_dense": "it normalises keys after their rotation",
    "hunyuan_v1_moe": "it normalises keys after their rotation",
}

logger = log.get(__name__)


def apply_lm_infinite(model: nn.Module, n_local: int, n_global: int, block_len: int | None = None) -> "LmInfinite":
    """Have every layer with full attention see the `n_local` latest tokens and the `n_global` first ones.

    Layers with a sliding window of their own keep it. `block_len` (queries per block) sets cost, not results. It goes
    with `install_rotary` in either order. Warns for n_local beyond the model's trained context and n_global >=
    n_local; `ValueError` for sizes out of range and, by name, for a model that lm_infinite does not fit.
    """
    if n_local < 1 or n_global < 0:
        raise ValueError(f"n_local={n_local}, n_global={n_global}: at least 1 and 0 tokens")
    if block_len is not None and block_len < 1:
        raise ValueError(f"block_len={block_len}: at least 1 query")
    return LmInfinite(model, n_local, n_global, block_len or default_block_len(n_local))


class LmInfinite:
    """LM-Infinite in force on one model; made by `apply_lm_infinite`."""

    def __init__(self, model: nn.Module, n_local: int, n_global: int, block_len: int) -> None:
        self.model, self.n_local, self.n_global = model, n_local, n_global
        attention = _attention_modules(model)
        turns = [turn_of(module) for module in attention]
        self._warn()
        windows = [own_window(module) for module in attention]
        longest = max(n_local, *(window or 1 for window in windows))
        tables = RotationTables(
            find_rotary_site(model), longest + max(rotated_span_len(longest, block_len), room(longest))
        )
        self.layers = [
            _Layer(
                module,
                n_local if window is None else window,
                n_global if window is None else 0,
                block_len,
                tables,
                turn,
            )
            for module, window, turn in zip(attention, windows, turns, strict=True)
        ]
        configs: dict[int, Any] = {id(module.config): module.config for module in (*attention, model)}
        self._before = [(config, config._attn_implementation) for config in configs.values()]
        for config in configs.values():
            config._attn_implementation = NAME
        self._removals = [model.register_forward_pre_hook(_refuse_what_it_cannot, with_kwargs=True)]
        for layer in self.layers:
            setattr(layer.module, LAYER, layer)
            self._removals.append(layer.module.register_forward_pre_hook(layer.before_call, with_kwargs=True))

    def new_cache(self) -> LambdaCache:
        """An empty cache for `past_key_values`, also of `generate`: its size does not grow with the stream."""
        return LambdaCache([LambdaCacheLayer(layer.n_local, layer.n_global) for layer in self.layers])

    def undo(self) -> None:
        """The model as it was; caches that were filled meanwhile are of no further use."""
        for config, implementation in self._before:
            config._attn_implementation = implementation
        for removal in self._removals:
            removal.remove()
        for layer in self.layers:
            if getattr(layer.module, LAYER, None) is layer:
                delattr(layer.module, LAYER)
        self._removals.clear()

    def _warn(self) -> None:
        trained = getattr(self.model.config, "max_position_embeddings", None)
        if trained is not None and self.n_local > trained:
            logger.warning(
                "n_local=%d is beyond the %d tokens that the model was trained for: distances up to n_local are new to "
                "it unless its frequencies are scaled",
                self.n_local,
                trained,
            )
        if self.n_global >= self.n_local:
            logger.warning("n_global=%d is not below n_local=%d: 10 to 100 is usual", self.n_global, self.n_local)


@dataclass(eq=False)
class _Layer:
    """What the attention of one layer needs beyond its call."""

    module: Any
    n_local: int
    n_global: int
    block_len: int
    tables: RotationTables
    turn: Turn
    cache: LambdaCacheLayer | None = None

    @property
    def layer_type(self) -> str | None:
        types = getattr(self.module.config, "layer_types", None)
        return None if types is None else types[self.module.layer_idx]

    def before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Have the model leave queries and keys unrotated, and tell the cache which new tokens are padding."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        cos, sin = call["position_embeddings"]
        call["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        cache = next((value for value in call.values() if isinstance(value, Cache)), None)
        if cache is not None and not isinstance(cache, (LambdaCache, DynamicCache)):
            raise ValueError(
                f"past_key_values={type(cache).__name__}: lm_infinite works with a LambdaCache (constant size) or a "
                "DynamicCache"
            )
        if isinstance(cache, DynamicCache):
            self._refuse_turned_keys(cache)
        self.cache = cache.layers[self.module.layer_idx] if isinstance(cache, LambdaCache) else None
        if self.cache is not None and call.get("attention_mask") is not None:
            self.cache.incoming = call["attention_mask"][:, -call["hidden_states"].shape[1] :]
        return (), call

    def _refuse_turned_keys(self, cache: Any) -> None:
        """A rotary handle whose t moves turns the keys of a DynamicCache, which it takes to be rotated."""
        spectrum = getattr(self.tables.site.module, "spectrum", None)
        before = getattr(cache, SPECTRUM, spectrum)
        setattr(cache, SPECTRUM, spectrum)
        stands_still = before is spectrum or (
            before is not None and spectrum is not None and torch.equal(before.inv_freq, spectrum.inv_freq)
        )
        if not stands_still:
            raise ValueError(
                f"past_key_values={type(cache).__name__}: t moved while keys are cached; with {NAME} pin it by "
                "handle.pinned(t) or handle.fixed(num_tokens)"
            )


def lm_infinite_attention(
    module: nn.Module,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B K T D"],
    value: Float[Tensor, "B K T V"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B S H V"], None]:
    """The function of the attention interface; `attention_mask` is bool [B, tokens], False at padding, or None."""
    layer: _Layer | None = getattr(module, LAYER, None)
    if layer is None:
        raise ValueError(f"attn_implementation={NAME}: call apply_lm_infinite(model, n_local=..., n_global=...) first")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask of {attention_mask.dim()} dimensions: {NAME} takes [rows, tokens]")
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: {NAME} does not know learned attention sinks")
    rule = SoftmaxRule(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, softcap)
    valid = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    order = None if valid is None else order_to_front(valid)
    window, start, stream = (
        _whole(layer, key, value, attention_mask) if layer.cache is None else _held(layer, key, value)
    )
    rotation = layer.tables.rotation(query, layer.layer_type, layer.turn)
    turned = None if layer.cache is None or torch.is_grad_enabled() else layer.cache.turned(rotation)
    output = lambda_attention(
        take(query, order), window, start, stream, layer.n_local, rotation, rule, layer.block_len, turned
    )
    return take(output, inverse(order)).transpose(1, 2).contiguous(), None


def padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Bool[Tensor, "B T"] | None:
    """Takes the place of transformers' masks: the padding as it was given, None when there is none."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()


def _held(layer: _Layer, key: Tensor, value: Tensor) -> tuple[KeyValues, KeyValues | None, Stream]:
    """From a cache of constant size: its window came as `key` and `value`."""
    assert layer.cache is not None
    return KeyValues(key, value), layer.cache.start, layer.cache.stream


def _whole(
    layer: _Layer, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[KeyValues, KeyValues | None, Stream]:
    """From all keys: without a cache, or with one that keeps everything."""
    num_keys, padding = key.shape[2], None
    window = KeyValues(key, value)
    if mask is not None:
        valid = mask[:, -num_keys:]
        order = order_to_front(valid)
        window, padding = KeyValues(take(key, order), take(value, order)), (~valid).sum(dim=1)
    stream = Stream(num_keys, padding)
    if layer.n_global == 0 or num_keys <= layer.n_local:
        return window, None, stream
    if padding is None:
        return window, window.span(0, min(layer.n_global, num_keys)), stream
    index = (padding[:, None] + torch.arange(layer.n_global, device=key.device)).clamp(max=num_keys - 1)
    return window, KeyValues(*(take(x, index) for x in window)), stream


def _attention_modules(model: nn.Module) -> list[Any]:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    modules: list[Any] = list(model.modules())
    if any(hasattr(module, LAYER) for module in modules):
        raise ValueError("apply_lm_infinite: it is in force on this model already; undo() the earlier one")
    if kind in UNSUPPORTED or hasattr(model.config, "qk_rope_head_dim"):
        reason = UNSUPPORTED.get(kind, "it rotates a part of each key that is held apart")
        raise ValueError(f"model_type={kind}: lm_infinite does not fit it ({reason})")
    found = [module for module in modules if hasattr(module, "layer_idx") and _uses_interface(module)]
    if not found:
        raise ValueError(
            f"model_type={kind}: its attention does not go through transformers' attention interface with rotary "
            "position embeddings, and lm_infinite has no adapter for it"
        )
    if all(own_window(module) is not None for module in found):
        raise ValueError(
            f"model_type={kind}: every layer has a sliding window of its own; set sliding_window to null in config.json"
        )
    return found


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    is_rotary = "position_embeddings" in inspect.signature(forward).parameters
    return is_rotary and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _refuse_what_it_cannot(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(f"output_attentions=True: {NAME} never forms the n x n weights; use attn_implementation=eager")
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None:
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(f"position_ids that jump (packed documents): {NAME} takes one stream a row")


AttentionInterface.register(NAME, lm_infinite_attention)
AttentionMaskInterface.register(NAME, padding_mask)
