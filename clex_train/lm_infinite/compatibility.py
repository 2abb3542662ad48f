"""Models and calls that lm_infinite supports; the rest are refused in one line."""

from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from clex_train.attention import kv_cache
from clex_train.attention.layer_probe import (
    LayerProbe,
    layer_type,
    layer_window,
    parameter_names,
    probe_layers,
    rotary_attention,
)
from clex_train.attention.select import ULYSSES
from clex_train.lm_infinite.adapters import ADAPTERS
from clex_train.lm_infinite.rotation import find_rotary_site
from clex_train.utils.errors import ConfigError

NAME = "lm_infinite"
LAYER = "lm_infinite_layer"
# Named because a probe cannot tell: a norm after the rotation leaves the keys' dependence on cos and sin intact.
UNSUPPORTED = {
    "codegen": "it packs its queries, keys and values by tensor-parallel shards of its own",
    "hunyuan_v1_dense": "it normalizes keys after their rotation",
    "hunyuan_v1_moe": "it normalizes keys after their rotation",
}


def model_type(model: Any) -> str:
    """Return the model type as transformers names it."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def attention_modules(model: nn.Module) -> list[Any]:
    """Find the attention module of every layer; `ConfigError` names a model type that lm_infinite does not support."""
    kind = model_type(model)
    modules: list[Any] = list(model.modules())
    if any(hasattr(module, LAYER) for module in modules):
        raise ValueError("apply_lm_infinite: already applied to this model; undo() the earlier one")
    reason = UNSUPPORTED.get(kind)
    # Multi-head latent attention (DeepSeek) keeps the rotated part of a key apart from the rest.
    if hasattr(model.config, "qk_rope_head_dim"):
        reason = "it rotates a separate part of each key"
    if kind in ADAPTERS:
        found = [module for module in modules if hasattr(module, "layer_idx")]
    else:
        found = rotary_attention(model)
        reason = reason or _find_misfit(model, found)
    if reason is not None:
        raise ConfigError("model_type", kind, f"lm_infinite does not support it ({reason})")
    if not found:
        raise ConfigError(
            "model_type",
            kind,
            "its attention does not go through transformers' attention interface with rotary "
            "position embeddings, and lm_infinite has no adapter for it",
        )
    # Layers with a window keep it, so there would be nothing to change.
    if all(layer_window(module) is not None for module in found):
        raise ConfigError(
            "model_type", kind, "every layer has a sliding window of its own; set sliding_window to null in config.json"
        )
    return found


def trained_context(model: Any) -> int | None:
    """Return the context length in tokens that the model was trained on; None if its config has none."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((length for name in names if isinstance(length := getattr(model.config, name, None), int)), None)


def check_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call of the model whose result would differ from the request (a forward pre-hook)."""
    chosen = module.config._attn_implementation
    # Attention is switched by name on the config; any other function would attend to unrotated keys.
    if chosen not in (NAME, ULYSSES):
        raise ValueError(f"attn_implementation={chosen}: {NAME} is applied and keeps keys unrotated; undo() it first")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(
            f"output_attentions=True: {NAME} never forms the n x n weights; undo() it, then attn_implementation=eager"
        )
    call = {**dict(zip(parameter_names(type(module).forward), args, strict=False)), **kwargs}
    cache = kv_cache.find_in_call(args, kwargs)
    # `generate` would feed it all tokens so far at every step; MPT's config has use_cache=False.
    if cache is not None and call.get("use_cache") is False:
        raise ValueError("use_cache=False with a KV cache: the cache would get each token many times; set it to True")
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if isinstance(cache, DynamicCache) and isinstance(mask, Tensor) and mask.dim() == 2:
        _require_kept_tokens(mask.bool(), cache, call)
    # One token has no jumps, and skipping it spares decoding the synchronization below.
    if positions is None or positions.shape[-1] == 1:
        return
    jumps = positions.diff(dim=-1) != 1
    if isinstance(mask, Tensor) and mask.dim() == 2:
        is_token = mask[:, -positions.shape[-1] :].bool()
        jumps = jumps & is_token[:, 1:] & is_token[:, :-1]
    if bool(jumps.any()):
        raise ValueError(f"position_ids that jump (packed documents): {NAME} supports one sequence per row")


def _require_kept_tokens(mask: Bool[Tensor, "B T"], cache: DynamicCache, call: dict[str, Any]) -> None:
    """Refuse padding among the keys of a windowed cache: it takes slots of tokens that a query still sees."""
    tokens = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    filled = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized]
    num_new = 0 if tokens is None else tokens.shape[1]
    for num_keys in {layer.keys.shape[2] + num_new for layer in filled}:
        lost, kept = mask[:, :-num_keys].any(dim=1), (~mask[:, -num_keys:]).any(dim=1)
        # Only for a full window, since the answer synchronizes.
        if mask.shape[1] > num_keys and bool((lost & kept).any()):
            raise ValueError(
                "attention_mask with padding behind tokens: the sliding window of the KV cache has evicted tokens "
                "that are still seen; pad on the left, or use DynamicCache() without a config"
            )


def _find_misfit(model: Any, found: list[Any]) -> str | None:
    """Return why the layers do not fit; None if they do."""
    if not found:
        return None
    num_layers = getattr(model.config, "num_hidden_layers", len(found))
    if sorted(module.layer_idx for module in found) != list(range(num_layers)):
        return f"{len(found)} of its {num_layers} layers have attention, the others a state of their own"
    if _has_state(model.config):
        return "its layers have a recurrent state besides their attention"
    return _describe_misfit(_probe_layers(model, found))


def _describe_misfit(probes: list[LayerProbe]) -> str | None:
    """Return the property of the layers that would give wrong numbers; None if there is none."""
    # lm_infinite rotates the keys of every layer, which would add positions to layers without them (NoPE).
    plain = [str(index) for index, trial in enumerate(probes) if trial.rotates is False]
    failed = [trial for trial in probes if not trial.reached_interface]
    if plain:
        return f"layers {', '.join(plain[:4])}{' ...' if len(plain) > 4 else ''} have no positions"
    if any(trial.options.get("s_aux") is not None for trial in probes):
        return "its attention has learned sinks"
    if any(trial.makes_mask for trial in probes):
        return "its attention builds masks of its own"
    reason = (failed[0].reason or "it is not in the interface") if failed else ""
    return f"its attention cannot be probed: {reason}" if failed else None


def _probe_layers(model: nn.Module, modules: list[Any]) -> list[LayerProbe]:
    """Probe each module with cos and sin from the model's own rotary module."""
    site = find_rotary_site(model)
    return probe_layers(modules, lambda module: site.cos_shape(layer_type(module)), model.config)


def _has_state(config: Any) -> bool:
    """Return True if layers keep a recurrent state in the cache, with or instead of keys."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)
