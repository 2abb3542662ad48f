"""Receptive field: which layers the scaled RoPE rotates, and how far back they see. Is there anything to extend?

Layers are probed one by one (`attention.layer_probe`), since families skip the rotation in layers with full attention
(SmolLM3, EXAONE 4, Cohere 2), and use windows in some layers or all (Gemma, Mistral v0.1, Phi-3 4k).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from clex_train.attention import layer_probe
from clex_train.attention.layer_probe import LayerProbe
from clex_train.model_config.meta_models import model_on_meta
from clex_train.rope.probe import Traits, find_rotary, length_dependent_type, probe, require_frequencies
from clex_train.rope.rotary import EXPANSIONS, POLAR
from clex_train.utils.errors import ConfigError


def local_layers(model: nn.Module, traits: Traits, context_len: int) -> frozenset[int]:
    """List the layers whose window is at most L tokens, where all layers share one RoPE."""
    # With a RoPE per layer type, the rotary module itself keeps them apart.
    if traits.scaled is not None:
        return frozenset()
    # A window of at most L shows no distance that the base model was not trained on.
    windows = {module.layer_idx: layer_probe.layer_window(module) for module in layer_probe.rotary_attention(model)}
    return frozenset(index for index, window in windows.items() if window is not None and window <= context_len)


def scaled_layers(model: nn.Module, traits: Traits, local: Collection[int]) -> dict[int, bool | None]:
    """Map each layer index to True if the scaled RoPE rotates its keys; None for unknown, False for `local` ones."""
    probed = _probe_layers(model, traits)
    return {module.layer_idx: False if module.layer_idx in local else rotates for module, rotates in probed}


def rotated_part(model: nn.Module, traits: Traits) -> str:
    """Name the part of a cache layer that holds the rotated keys: `keys`, or `values` under latent attention."""
    modules = layer_probe.rotary_attention(model)
    return next((trial.rotated_part for trial in _trials(model, modules, traits) if trial.rotates), "keys")


def require_scalable(model: nn.Module, rotary: nn.Module, traits: Traits, context_len: int) -> None:
    """Raise `ConfigError`, naming the model type, where scaled frequencies would have no effect.

    That is the case when some frequencies are 0, at every t, or when every rotated layer sees a window of at most L
    tokens and so no new distance. `rotary` is the model's own rotary module.
    """
    require_frequencies(rotary, traits, getattr(model, "config", None))
    _require_reach(model, traits, context_len)
    rope_type, local = length_dependent_type(rotary), local_layers(model, traits, context_len)
    if rope_type is not None and local:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ConfigError(
            "rope_type",
            f"{rope_type} of model_type={kind}",
            f"layers {', '.join(map(str, sorted(local)))} see at most L tokens and share a RoPE that follows the "
            "length, which theta(t) would take from them; scaling=none trains it unchanged",
        )


def require_scalable_config(config: PretrainedConfig, context_len: int, trust_remote_code: bool = False) -> None:
    """Check an architecture like `require_scalable`, without weights."""
    model = model_on_meta(config, trust_remote_code)
    rotary = find_rotary(model).module
    require_scalable(model, rotary, probe(rotary, model.config), context_len)


def _require_reach(model: nn.Module, traits: Traits, context_len: int) -> None:
    probed = _probe_layers(model, traits)
    windows = [layer_probe.layer_window(module) for module, rotates in probed if rotates]
    open_ended = any(window is None or window > context_len for window in windows)
    # Refuse only what is certain: with an unknown layer the model may well be extensible.
    if not windows or open_ended or any(rotates is None for _, rotates in probed):
        return
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    longest = max(window for window in windows if window is not None)
    known = f"model_type={kind}: every layer with RoPE sees a window of {longest} tokens, at most L = {context_len}"
    if any(layer_probe.layer_window(module) is None for module, _ in probed):
        raise ConfigError(
            f"{known}, and layers with full attention have no positions", None, "there is nothing to extend"
        )
    raise ConfigError(known, None, "there is nothing to extend; set sliding_window to null in config.json")


def _probe_layers(model: nn.Module, traits: Traits) -> list[tuple[Any, bool | None]]:
    """Probe every attention module with positions: does the scaled RoPE rotate its keys?"""
    modules = layer_probe.rotary_attention(model)
    is_local = [traits.scaled is not None and layer_probe.layer_type(module) != traits.scaled for module in modules]
    found = zip(modules, _trials(model, modules, traits), is_local, strict=True)
    return [(module, False if local else _rotates(trial, traits)) for module, trial, local in found]


def _rotates(trial: LayerProbe, traits: Traits) -> bool | None:
    """Return True if the probe saw rotated keys, None if it is unknown which of their components rotate."""
    width = 2 * len(traits.base[traits.scaled].inv_freq)
    # The rotated part of a latent key is cached by itself; next to other values its place would be a guess.
    is_known = trial.rotated_part == "keys" or trial.rotated_width == width
    return trial.rotates if is_known else None


def _trials(model: nn.Module, modules: list[Any], traits: Traits) -> list[LayerProbe]:
    """Probe modules with cos and sin of the RoPE of their layer type."""

    def cos_shape(module: Any) -> tuple[int, ...] | None:
        # A model with one RoPE keys its base spectrum by None, whatever layer types its config lists.
        kind = None if traits.scaled is None else layer_probe.layer_type(module)
        if kind not in traits.base:
            return None
        return tuple(EXPANSIONS[traits.expansion](torch.empty(1, 2, len(traits.base[kind].inv_freq))).shape)

    config = getattr(model, "config", None)
    return layer_probe.probe_layers(modules, cos_shape, config, is_complex=traits.expansion == POLAR)
