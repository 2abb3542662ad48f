"""Scaling recipes: write a method as a stock config.json, so that any Hugging Face program runs the trained model.

`t` is one scale factor for the whole run, L the context length of the base. The config then names t * L as
`max_position_embeddings` and L as `original_max_position_embeddings`; `dynamic`, whose formula reads L from
`max_position_embeddings`, keeps L there. The method adds its `rope_parameters` (`scaling.methods`).
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.model_config.context_length import original_context
from clex_train.rope.hf_scalings import ConfiguredRope, base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.probe import follows_length, require_rotary
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling import methods
from clex_train.scaling.methods.static import Static
from clex_train.scaling.spectrum import STILL, Spectrum
from clex_train.scaling.static_rope import StaticRope
from clex_train.utils.errors import require

UNSCALED = "default"


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
    kind, name = base.model_type, scaling.name.name
    remedy = (
        f"its rope_parameters apply to whole heads: model_type={kind} would rotate {len(after.inv_freq)} pairs, but "
        f"its weights were trained with {len(own)}"
    )
    require(len(after.inv_freq) == len(own), "scaling.name", name, remedy)
    # A family whose own code reads its base elsewhere would silently train without scaling.
    follows = not (method.changes(factor) and torch.equal(rope.inv_freq, after.inv_freq))
    remedy = f"the frequencies of model_type={kind} do not follow rope_parameters; scaling=clex scales them"
    require(follows, "scaling.name", name, remedy)
    return arch


def spectrum_at(handle: RotaryHandle, t: float) -> Spectrum:
    """Return the spectrum that a model computes by itself for a call of t * L tokens."""
    if handle.own is not None:
        return replace(handle.own.at(t), t=t)
    return Spectrum(handle.base_inv_freq, t=t)


def learned_module(scaling: ScalingConfig, handle: RotaryHandle, formula: Spectrum) -> StaticRope:
    """Build the module that `scaling=static` trains, on a model with the architecture of `scaled`."""
    rope, method = base_rope(handle), methods.for_training(scaling)
    assert isinstance(method, Static)
    # The model's own frequencies are the start by now; plain RoPE follows from the base in its config.
    pairs = torch.arange(len(rope.inv_freq)).double() / len(rope.inv_freq)
    return method.module(replace(rope, inv_freq=rope.theta**-pairs), formula.t)


def with_learned(config: PretrainedConfig, moved: Float[Tensor, " P"]) -> PretrainedConfig:
    """Return a copy of the config of `scaling=static` in which every frequency is multiplied by exp(`moved`)."""
    learned = copy.deepcopy(config)
    every: Any = learned.get_text_config().rope_parameters
    # By layer type, the scaled one alone is longrope.
    for each in [every] if "rope_type" in every else every.values():
        if each["rope_type"] == "longrope":
            factors = torch.tensor(each["long_factor"], dtype=torch.float64) * (-moved.double()).exp()
            each["short_factor"] = each["long_factor"] = factors.clamp(max=STILL).tolist()
    return learned


def require_unscaled(config: PretrainedConfig, name: Method) -> None:
    """Raise `ConfigError` if the context of an architecture was extended before: scalings would compound."""
    text: Any = config.get_text_config()
    original, served = original_context(config), getattr(text, "max_position_embeddings", None)
    own = getattr(text, "rope_parameters", None) or {}
    # A RoPE that follows the length is unscaled up to L; a longrope with equal lists has one scaling for all lengths.
    is_unscaled = follows_length(own.get("rope_type")) and (
        own.get("short_factor") is None or own.get("short_factor") != own.get("long_factor")
    )
    require(
        is_unscaled or original is None or served is None or original >= served,
        "scaling.name",
        name.name,
        f"this model's context was extended before, from {original} to {served} tokens "
        "(original_max_position_embeddings in config.json); scaling=none trains it on, others start from its base",
    )
