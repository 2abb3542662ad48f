"""Scaling recipes: write a method as a stock config.json, so that any Hugging Face program runs the trained model.

`t` is one scale factor for the whole run, L the context length of the base. The config then names t * L as
`max_position_embeddings` and L as `original_max_position_embeddings`; `dynamic`, whose formula reads L from
`max_position_embeddings`, keeps L there. The method adds its `rope_parameters` (`scaling.methods`).
"""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.rope.hf_scalings import ConfiguredRope
from clex_train.rope.native import native_handle_on_meta
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.probe import LOCAL_LAYER_TYPES, require_rotary
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling import methods
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, require

UNSCALED = "default"
# These scale every call by the same factor, so a config may state the length before or after scaling.
STATIC = ("linear", "yarn", "llama3")
# MPT and Bloom have no table of positions, and use other names for the length.
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")


class ContextLength(NamedTuple):
    """L in tokens, and its source, for messages."""

    length: int
    source: str


def scaled(
    base: PretrainedConfig, scaling: ScalingConfig, factor: float, context_len: int, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return a copy of the architecture `base` with the RoPE of `scaling.name` at scale factor `factor`.

    Raises:
        ConfigError: the architecture is scaled already, or its config cannot express the scaling.
    """
    before = require_rotary(base, trust_remote_code)
    require_unscaled(base, scaling.name)
    require_scalable_config(base, context_len, trust_remote_code)
    arch = copy.deepcopy(base)
    text: Any = arch.get_text_config()
    own = before.base[before.scaled].inv_freq
    rope = ConfiguredRope(own, context_len, config=text, layer_type=before.scaled)
    rope_type = rope.parameters.get("rope_type")
    require(
        rope_type == UNSCALED,
        "scaling.name",
        scaling.name.name,
        f"model_type={base.model_type} has rope_type={rope_type} in rope_parameters, but a recipe starts from "
        f"{UNSCALED}; scaling=none trains it unchanged",
    )
    method = methods.for_training(scaling)
    rope.update(method.hf_parameters(rope, factor))
    text.max_position_embeddings = context_len
    if not method.counts_from_context:
        text.original_max_position_embeddings = context_len
        text.max_position_embeddings = round(factor * context_len)
    # Build the scaled architecture without weights, and look at the frequencies it really gets.
    handle = native_handle_on_meta(arch, context_len, trust_remote_code)
    after = spectrum_at(handle, factor)
    # Meta models may be shared (`sharing_meta_models`), so leave this one unchanged.
    handle.undo()
    require(
        len(after.inv_freq) == len(own),
        "scaling.name",
        scaling.name.name,
        f"its rope_parameters apply to whole heads: model_type={base.model_type} would rotate {len(after.inv_freq)} "
        f"pairs, but its weights were trained with {len(own)}",
    )
    require(
        not (method.changes(factor) and torch.equal(rope.inv_freq, after.inv_freq)),
        "scaling.name",
        scaling.name.name,
        # A family whose own code reads its base elsewhere would silently train without scaling.
        f"the frequencies of model_type={base.model_type} do not follow rope_parameters; scaling=clex scales them",
    )
    return arch


def spectrum_at(handle: RotaryHandle, t: float) -> Spectrum:
    """Return the spectrum that a model computes by itself for a call of t * L tokens."""
    if handle.own is not None:
        return replace(handle.own.at(t), t=t)
    return Spectrum(handle.base_inv_freq, t=t)


def original_context(config: PretrainedConfig) -> int | None:
    """Return L of an architecture whose context was extended, as its config states it; None if it does not."""
    return stated_length(config, "original_max_position_embeddings")


def own_context(config: PretrainedConfig, key: str = "model.context_len") -> ContextLength | None:
    """Read the context length that an architecture serves without us; None if its config does not state one.

    Raises:
        ConfigError: the config may state the length before or after scaling; asks for `key`.
    """
    text, original = config.get_text_config(), stated_length(config, "original_max_position_embeddings", key)
    if original is not None:
        return ContextLength(original, "original_max_position_embeddings")
    lengths = ((name, stated_length(config, name, key)) for name in LENGTHS)
    stated = next((ContextLength(length, name) for name, length in lengths if length is not None), None)
    by_layer_type = getattr(text, "rope_parameters", None) or {}
    parameters = _global_parameters(by_layer_type)
    rope_type, own = parameters.get("rope_type"), parameters.get("original_max_position_embeddings")
    if rope_type == "longrope" and own:
        # Its short factors apply up to there; beyond that the model switches by itself.
        return ContextLength(int(own), "original_max_position_embeddings of its longrope")
    # Static scaling may be in `max_position_embeddings` already: DeepSeek multiplies it, Qwen's model cards do not.
    factor = float(parameters.get("factor") or 1)
    if rope_type not in STATIC or stated is None or factor <= 1:
        return stated
    if parameters is not by_layer_type and own is None:
        # Gemma 3, whose local layers are not scaled, states the length that its scaled layers serve.
        return stated
    return _static_context(str(rope_type), factor, own, stated, key)


def stated_length(config: PretrainedConfig, name: str, key: str = "model.context_len") -> int | None:
    """Read a number of tokens; `ConfigError` asks for `key` if the value is impossible."""
    value = getattr(config.get_text_config(), name, None)
    if value is None:
        return None
    source = f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"
    if not (isinstance(value, (int, float)) and 2 <= value <= MOST_TOKENS and value == int(value)):
        raise ConfigError(
            source,
            None,
            f"{name}={value}: must be from 2 to {MOST_TOKENS:,} tokens; correct it, or set the context length "
            f"that the model serves by {key}=N",
        )
    return int(value)


def _static_context(rope_type: str, factor: float, own: Any, stated: ContextLength, key: str) -> ContextLength:
    """Return L under static scaling of the original length `own` by `factor`."""
    if rope_type == "llama3":
        # The factor divides the slowest frequencies; it is not the ratio of the lengths.
        served = stated if own and stated.length > own else None
    else:
        served = (
            ContextLength(round(factor * own), f"{rope_type} factor {factor:g} * original {own:,}") if own else None
        )
    require(
        served is not None and stated.length <= served.length,
        key,
        None,
        f"the config scales RoPE by {rope_type} (factor {factor:g}, original {own}) and states {stated.source}="
        f"{stated.length}, which may be the length before or after; set the length that the model serves",
    )
    assert served is not None
    return stated if served.length == stated.length else served


def _global_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the `rope_parameters` of the layers with global attention, if each layer type has its own."""
    nested = {name: each for name, each in parameters.items() if isinstance(each, dict)}
    chosen = [each for name, each in nested.items() if name not in LOCAL_LAYER_TYPES]
    return chosen[0] if chosen else parameters


def require_unscaled(config: PretrainedConfig, name: Method) -> None:
    """Raise `ConfigError` if the context of an architecture was extended before: scalings would compound."""
    original, served = original_context(config), getattr(config.get_text_config(), "max_position_embeddings", None)
    require(
        original is None or served is None or original >= served,
        "scaling.name",
        name.name,
        f"this model's context was extended before, from {original} to {served} tokens "
        "(original_max_position_embeddings in config.json); scaling=none trains it on, others "
        "start from its base",
    )
