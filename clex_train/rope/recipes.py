"""Scaling by a formula as a stock config.json says it, so that any Hugging Face program runs what was trained.

`t` is one scale factor for the whole run, L the context length of the base. The config then names t * L as
`max_position_embeddings` and L as `original_max_position_embeddings`; dynamic, which counts from
`max_position_embeddings` on, keeps L there. What else it says is the method's (`scaling.methods`).
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
from clex_train.utils.bounds import MOST_TOKENS, require
from clex_train.utils.errors import ConfigError

UNSCALED = "default"
# These scale every call alike, so a config may give the length before or after.
STATIC = ("linear", "yarn", "llama3")
# MPT and Bloom have no table of positions, and call the length otherwise.
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")


class ContextLength(NamedTuple):
    """L in tokens, and where it comes from, in words for the user."""

    length: int
    source: str


def scaled(
    base: PretrainedConfig, scaling: ScalingConfig, factor: float, context_len: int, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A copy of the architecture `base` with the RoPE of `scaling.name` at scale factor `factor`.

    `ValueError` in one line for an architecture that is scaled already, or that has no parameters to say it in.
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
        f"model_type={base.model_type} has rope_type={rope_type} in rope_parameters, and a recipe starts from "
        f"{UNSCALED}; scaling=none trains it as it is",
    )
    method = methods.for_training(scaling)
    rope.update(method.hf_parameters(rope, factor))
    text.max_position_embeddings = context_len
    if not method.counts_from_context:
        text.original_max_position_embeddings = context_len
        text.max_position_embeddings = round(factor * context_len)
    handle = native_handle_on_meta(arch, context_len, trust_remote_code)
    after = spectrum_at(handle, factor)
    handle.undo()
    require(
        len(after.inv_freq) == len(own),
        "scaling.name",
        scaling.name.name,
        f"its rope_parameters are of whole heads: model_type={base.model_type} would rotate {len(after.inv_freq)} "
        f"pairs, and its weights were trained with {len(own)}",
    )
    require(
        not (method.changes(factor) and torch.equal(rope.inv_freq, after.inv_freq)),
        "scaling.name",
        scaling.name.name,
        # A family whose own code reads its base elsewhere would train unscaled without a word.
        f"the frequencies of model_type={base.model_type} do not follow rope_parameters; scaling=clex scales them",
    )
    return arch


def spectrum_at(handle: RotaryHandle, t: float) -> Spectrum:
    """What a model computes by itself for a call of t * L tokens, beside the attention factor that it always has."""
    if handle.own is not None:
        return replace(handle.own.at(t), t=t)
    return Spectrum(handle.base_inv_freq, t=t)


def original_context(config: PretrainedConfig) -> int | None:
    """L of an architecture whose context was extended, as it says itself; None where it does not."""
    return stated_length(config, "original_max_position_embeddings")


def own_context(config: PretrainedConfig, key: str = "model.context_len") -> ContextLength | None:
    """Read the context that an architecture serves by itself; None where it does not say.

    A static scaling may or may not be in `max_position_embeddings` already: Qwen's cards leave it at the unscaled
    length, DeepSeek multiplies it. Where neither can be told, `ValueError` asks for `key`.
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
        # Its short factors end there; beyond it follows the length by itself.
        return ContextLength(int(own), "original_max_position_embeddings of its longrope")
    factor = float(parameters.get("factor") or 1)
    if rope_type not in STATIC or stated is None or factor <= 1:
        return stated
    if parameters is not by_layer_type and own is None:
        # Gemma 3, whose local layers are as they were, states the length that its scaled layers serve.
        return stated
    return _static_context(str(rope_type), factor, own, stated, key)


def stated_length(config: PretrainedConfig, name: str, key: str = "model.context_len") -> int | None:
    """Read a number of tokens; `ValueError` asks for `key` where it cannot be meant."""
    value = getattr(config.get_text_config(), name, None)
    if value is None:
        return None
    source = f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"
    if not (isinstance(value, (int, float)) and 2 <= value <= MOST_TOKENS and value == int(value)):
        raise ConfigError(
            source,
            None,
            f"{name}={value}: from 2 to {MOST_TOKENS:,} tokens can be meant; correct it, or name the context "
            f"that the model serves by {key}=N",
        )
    return int(value)


def _static_context(rope_type: str, factor: float, own: Any, stated: ContextLength, key: str) -> ContextLength:
    """L under a static scaling by `factor` of the `own` original length."""
    if rope_type == "llama3":
        # Its factor is that of the slowest frequencies, not the ratio of the lengths.
        served = stated if own and stated.length > own else None
    else:
        served = (
            ContextLength(round(factor * own), f"{rope_type} factor {factor:g} * original {own:,}") if own else None
        )
    require(
        served is not None and stated.length <= served.length,
        key,
        None,
        f"the config scales RoPE by {rope_type} (factor {factor:g}, original {own}) and says {stated.source}="
        f"{stated.length}, which may be the length before or after; set the length that the model serves",
    )
    assert served is not None
    return stated if served.length == stated.length else served


def _global_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """The RoPE of the layers that see the whole context, where each type of layer has its own."""
    nested = {name: each for name, each in parameters.items() if isinstance(each, dict)}
    chosen = [each for name, each in nested.items() if name not in LOCAL_LAYER_TYPES]
    return chosen[0] if chosen else parameters


def require_unscaled(config: PretrainedConfig, name: Method) -> None:
    """`ValueError` when the context of an architecture was extended before: another scaling would be on top of that."""
    original, served = original_context(config), getattr(config.get_text_config(), "max_position_embeddings", None)
    require(
        original is None or served is None or original >= served,
        "scaling.name",
        name.name,
        f"this model's context was extended before, from {original} to {served} tokens "
        "(original_max_position_embeddings in config.json); scaling=none trains it on, others "
        "start from its base",
    )
