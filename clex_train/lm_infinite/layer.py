"""Lambda attention of one layer of a Hugging Face model: hooks, the attention function and the padding mask.

A hook on the attention module has the model rotate by cos = 1, sin = 0, and `lm_infinite_attention` hands its unrotated
queries and keys to `lambda_attention`. Both functions are registered with transformers under the name `lm_infinite`.
Shapes: `B` batch, `H` heads, `K` key heads, `S` new tokens, `T` keys, `D` and `V` head dims, `E` hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from clex_train.attention import kv_cache
from clex_train.attention.kv_cache import LibraryChanged
from clex_train.attention.layer_probe import parameter_names
from clex_train.attention.padding import gather_tokens, invert_order, left_pad_order
from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.attention.visible_keys import MOST_VISIBLE
from clex_train.lm_infinite.adapters import Adapter
from clex_train.lm_infinite.back_ends import BackEndChoice, CallFacts
from clex_train.lm_infinite.cache import LambdaCache, LambdaCacheLayer
from clex_train.lm_infinite.compatibility import LAYER, NAME
from clex_train.lm_infinite.lambda_attention import Scheme, lambda_attention
from clex_train.lm_infinite.middle_tokens import Middle
from clex_train.lm_infinite.rotation import RotarySite, TableRotation
from clex_train.lm_infinite.stream import KeyValues, Rotation, Stream

SPECTRUM = "lm_infinite_spectrum"


@dataclass(eq=False)
class LambdaLayer:
    """State of Lambda attention for one layer."""

    module: Any
    n_local: int
    n_global: int
    block_len: int | None
    rotation: Callable[[Tensor], Rotation]
    site: RotarySite | None
    middle: Middle | None
    adapter: Adapter | None
    choice: BackEndChoice
    cache: LambdaCacheLayer | None = None
    has_cache: bool = False
    """True if the current call has a KV cache among its arguments."""
    own_forward: Any = None

    def enter(self) -> None:
        """Attach to the module, and replace its `forward` where the family needs an adapter."""
        setattr(self.module, LAYER, self)
        # With a middle a query may see any key, so log-scaling counts them all.
        if self.middle is None:
            setattr(self.module, MOST_VISIBLE, self.n_local + self.n_global)
        if self.adapter is not None:
            # Another patch may have set `forward` on the instance already; `leave` restores it.
            self.own_forward = self.module.__dict__.get("forward")
            self.module.forward = self.forward

    def leave(self) -> None:
        """Undo `enter`."""
        delattr(self.module, LAYER)
        self.module.__dict__.pop(MOST_VISIBLE, None)
        if self.adapter is not None:
            del self.module.forward
            if self.own_forward is not None:
                self.module.forward = self.own_forward

    def before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the model leave queries and keys unrotated, and announce the new tokens' padding to the cache."""
        call = {**dict(zip(parameter_names(type(module).forward), args, strict=False)), **kwargs}
        if call.get("position_embeddings") is not None:
            cos, sin = (x.to(_compute_dtype(x)) for x in call["position_embeddings"][:2])
            # Rotation by cos = 1, sin = 0 is the identity, whatever the family's layout of pairs.
            call["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        cache = kv_cache.find_in_call((), call)
        self._check_cache(cache)
        self.has_cache = cache is not None
        mask = call.get("attention_mask")
        # MPT's stand-in for "no padding"; see `padding_mask`.
        if mask is not None and mask.dim() == 0:
            call["attention_mask"] = mask = None
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask of {mask.dim()} dimensions: {NAME} takes [rows, tokens]")
        self.cache = cache.layers[self.module.layer_idx] if isinstance(cache, LambdaCache) else None
        if self.cache is not None:
            num_rows, num_new = call["hidden_states"].shape[:2]
            self.cache.expect(num_rows, None if mask is None else mask[:, -num_new:])
        return (), call

    def forward(self, hidden_states: Float[Tensor, "B S E"], **call: Any) -> tuple[Float[Tensor, "B S E"], None]:
        """Compute attention in place of the module's own `forward`."""
        assert self.adapter is not None
        query, key, value = self.adapter.project(self.module, hidden_states)
        cache = kv_cache.find_in_call((), call)
        if cache is not None:
            key, value = cache.update(key, value, self.module.layer_idx)
        rule = self.adapter.softmax(self.module, query.device)
        attended = _attend(self, query, key, value, call.get("attention_mask"), rule)
        return self.adapter.finish(self.module, attended.flatten(2), call), None

    def _check_cache(self, cache: Cache | None) -> None:
        kind = type(cache).__name__
        if cache is not None and not isinstance(cache, (LambdaCache, DynamicCache)):
            raise ValueError(f"cache={kind}: lm_infinite supports a LambdaCache (constant size) or a DynamicCache")
        if isinstance(cache, LambdaCache) and self.middle is not None:
            raise ValueError(f"cache={kind}: middle={self.middle} needs all keys; use a DynamicCache")
        if isinstance(cache, LambdaCache):
            layer = cache.layers[self.module.layer_idx]
            if (layer.n_local, layer.n_global) != (self.n_local, self.n_global):
                raise ValueError(
                    f"cache={kind}: made for n_local={layer.n_local}, n_global={layer.n_global}, not for "
                    f"{self.n_local}, {self.n_global}; call new_cache() of the current handle"
                )
        if isinstance(cache, DynamicCache) and self.site is not None:
            self._require_unrotated_keys(cache, getattr(self.site.module, "spectrum", None))

    def _require_unrotated_keys(self, cache: Any, spectrum: Any) -> None:
        """Refuse a DynamicCache whose keys are rotated, or whose model's t has moved since."""
        if not hasattr(cache, SPECTRUM) and cache.get_seq_length(self.module.layer_idx):
            raise ValueError(
                f"cache={type(cache).__name__}: it was filled without {NAME}, so its keys are rotated; "
                "start with an empty one"
            )
        # A rotary handle rerotates a DynamicCache when t moves, which would rotate these unrotated keys.
        before = getattr(cache, SPECTRUM, spectrum)
        setattr(cache, SPECTRUM, spectrum)
        stands_still = before is spectrum or (
            before is not None and spectrum is not None and torch.equal(before.inv_freq, spectrum.inv_freq)
        )
        if not stands_still:
            raise ValueError(
                f"cache={type(cache).__name__}: t moved while keys are cached; with {NAME} pin it by "
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
    """Attend by transformers' attention interface.

    `attention_mask` is bool [B, tokens], False at padding, or None.
    """
    layer: LambdaLayer | None = getattr(module, LAYER, None)
    if layer is None:
        raise ValueError(f"attn_implementation={NAME}: call apply_lm_infinite(model, n_local=..., n_global=...) first")
    rule = SoftmaxRule(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, softcap)
    return _attend(layer, query, key, value, attention_mask, rule), None


def padding_mask(
    *args: Any, attention_mask: Tensor | None = None, config: Any = None, **kwargs: Any
) -> Bool[Tensor, "B T"] | Bool[Tensor, ""] | None:
    """Return the padding in place of transformers' masks; None when there is none."""
    if attention_mask is not None and not bool(attention_mask.all()):
        return attention_mask.bool()
    # MPT's forward fails on None, so a scalar stands for it.
    return torch.ones((), dtype=torch.bool) if getattr(config, "model_type", None) == "mpt" else None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that queries, keys and values have where cos and sin are `x`."""
    kind = x.device.type
    # Under autocast the projections are bfloat16 while cos and sin stay float32.
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _attend(
    layer: LambdaLayer, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, rule: SoftmaxRule
) -> Float[Tensor, "B S H V"]:
    if key.shape[2] != query.shape[2] and not layer.has_cache:
        kind = type(layer.module).__name__
        raise LibraryChanged(f"{kind} attends to keys of a KV cache, but none was found in its arguments")
    valid = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    order = None if valid is None else left_pad_order(valid)
    window, start, stream = (
        _from_all_keys(layer, key, value, attention_mask)
        if layer.cache is None
        else _from_lambda_cache(layer, key, value)
    )
    rotation = layer.rotation(query)
    # Rotated keys are cached without gradients only: the copy would cut the graph.
    rotated_keys = None
    if layer.cache is not None and isinstance(rotation, TableRotation) and not torch.is_grad_enabled():
        rotated_keys = layer.cache.rotated_window(rotation)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    back_end = layer.choice.select(CallFacts(query, value, rule, stream.num_padding is not None, wants_gradient))
    scheme = Scheme(layer.n_local, rotation, rule, layer.block_len, layer.middle, back_end)
    output = lambda_attention(gather_tokens(query, order), window, start, stream, scheme, rotated_keys)
    return gather_tokens(output, invert_order(order)).transpose(1, 2).contiguous()


def _from_lambda_cache(layer: LambdaLayer, key: Tensor, value: Tensor) -> tuple[KeyValues, KeyValues | None, Stream]:
    """Return window, start and stream from a constant-size cache, which returned its window as `key` and `value`."""
    assert layer.cache is not None
    return KeyValues(key, value), layer.cache.start, layer.cache.stream


def _from_all_keys(
    layer: LambdaLayer, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[KeyValues, KeyValues | None, Stream]:
    """Return window, start and stream from all keys: without a cache, or with one that keeps everything."""
    num_keys, padding = key.shape[2], None
    window = KeyValues(key, value)
    if mask is not None:
        valid = mask[:, -num_keys:]
        order = left_pad_order(valid)
        window, padding = KeyValues(gather_tokens(key, order), gather_tokens(value, order)), (~valid).sum(dim=1)
    stream = Stream(num_keys, padding)
    # The starting tokens are all within the window.
    if layer.n_global == 0 or num_keys <= layer.n_local:
        return window, None, stream
    if padding is None:
        return window, window.span(0, min(layer.n_global, num_keys)), stream
    # Padding is at the front by now, so each row's first valid token is at index `padding`.
    index = (padding[:, None] + torch.arange(layer.n_global, device=key.device)).clamp(max=num_keys - 1)
    return window, KeyValues(*(gather_tokens(x, index) for x in window)), stream


AttentionInterface.register(NAME, lm_infinite_attention)
AttentionMaskInterface.register(NAME, padding_mask)
