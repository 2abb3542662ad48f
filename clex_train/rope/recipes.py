"""Scaling by a formula as a stock config.json says it, so that any Hugging Face program runs what was trained.

    pi           linear    theta_j / t                                    Chen et al., arXiv 2306.15595
    ntk          default   rope_theta * (2t - 1)^(d / (d - 2))            CLEX, arXiv 2310.16450: where CLEX starts
    yarn         yarn      by parts, and a factor on cos and sin          Peng et al., arXiv 2309.00071
    dynamic_ntk  dynamic   base * (t n/L - t + 1)^(d / (d - 2)) at n tokens    transformers, after NTK-aware scaling
    theta        default   rope_theta = scaling.rope_theta                Code Llama, arXiv 2308.12950
    longrope     longrope  theta_j / factor_j, up to L and beyond         Ding et al., arXiv 2402.13753
    random_pos   default   as they are: the positions do the work         Ruoss et al., arXiv 2305.16843

`t` is one scale factor for the whole run, L the context length of the base, d the rotary dimension. The config then
names t * L as `max_position_embeddings` and L as `original_max_position_embeddings`; dynamic, which counts n from
`max_position_embeddings` on, keeps L there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from clex_train.rope.as_is import handle_without_weights
from clex_train.rope.hf_scalings import read_longrope_factors
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.probe import Traits, require_rotary
from clex_train.scaling.spectrum import Spectrum
from clex_train.settings.bounds import require
from clex_train.settings.scaling import ScalingConfig, ScalingName

UNSCALED = "default"


@dataclass(frozen=True)
class _Asked:
    """What a recipe writes its parameters from."""

    scaling: ScalingConfig
    factor: float
    context_len: int
    num_pairs: int
    rope_theta: float


def scaled(
    base: PretrainedConfig, scaling: ScalingConfig, factor: float, context_len: int, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A copy of the architecture `base` with the RoPE of `scaling.name` at scale factor `factor`.

    `ValueError` in one line for an architecture that is scaled already, or that has no parameters to say it in.
    """
    before = require_rotary(base, trust_remote_code)
    require_unscaled(base, scaling.name)
    arch = copy.deepcopy(base)
    text: Any = arch.get_text_config()
    parameters = _parameters(text, before)
    rope_type = (parameters or {}).get("rope_type")
    require(
        parameters is not None and rope_type == UNSCALED,
        "scaling.name",
        scaling.name.name,
        f"model_type={base.model_type} has rope_type={rope_type} in rope_parameters, and a recipe starts from "
        f"{UNSCALED}; scaling=none trains it as it is",
    )
    assert parameters is not None
    own = before.base[before.scaled].inv_freq
    asked = _Asked(scaling, factor, context_len, len(own), parameters["rope_theta"])
    parameters.update(PARAMETERS[scaling.name](asked))
    text.max_position_embeddings = context_len
    if scaling.name is not ScalingName.dynamic_ntk:
        text.original_max_position_embeddings = context_len
        text.max_position_embeddings = round(factor * context_len)
    after = spectrum_at(handle_without_weights(arch, context_len, trust_remote_code), factor)
    _require_followed(scaling, factor, own, after.inv_freq, base.model_type)
    return arch


def spectrum_at(handle: RotaryHandle, t: float) -> Spectrum:
    """What a model computes by itself for a call of t * L tokens, beside the attention factor that it always has."""
    if handle.own is not None:
        return replace(handle.own.at(t), t=t)
    return Spectrum(handle.base_inv_freq, t=t)


def original_context(config: PretrainedConfig) -> int | None:
    """L of an architecture whose context was extended, as it says itself; None where it does not."""
    length = getattr(config.get_text_config(), "original_max_position_embeddings", None)
    return None if length is None else int(length)


def require_unscaled(config: PretrainedConfig, name: ScalingName) -> None:
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


def _parameters(text: Any, traits: Traits) -> dict[str, Any] | None:
    """The rope_parameters of the layers that long contexts need; None when the architecture has none."""
    parameters: dict[str, Any] | None = getattr(text, "rope_parameters", None)
    if parameters is None or traits.scaled is None:
        return parameters
    return parameters.get(traits.scaled)


def _linear(asked: _Asked) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": float(asked.factor)}


def _ntk(asked: _Asked) -> dict[str, Any]:
    """A larger base is NTK scaling: b'^(-2j/d) = b^(-2j/d) * (2t - 1)^(-2j/(d-2)). The only pair of d = 2 stays."""
    exponent = asked.num_pairs / (asked.num_pairs - 1) if asked.num_pairs > 1 else 0.0
    return {"rope_theta": asked.rope_theta * (2 * asked.factor - 1) ** exponent}


def _yarn(asked: _Asked) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": float(asked.factor),
        "original_max_position_embeddings": asked.context_len,
    }


def _dynamic(asked: _Asked) -> dict[str, Any]:
    return {"rope_type": "dynamic", "factor": float(asked.factor)}


def _longrope(asked: _Asked) -> dict[str, Any]:
    key, path = "scaling.longrope_factors", asked.scaling.longrope_factors
    require(path is not None, key, path, "longrope needs them: name a JSON file with short_factor and long_factor")
    return {
        "rope_type": "longrope",
        "factor": float(asked.factor),
        "original_max_position_embeddings": asked.context_len,
        **read_longrope_factors(str(path), asked.num_pairs, key),
    }


def _theta(asked: _Asked) -> dict[str, Any]:
    require(
        asked.scaling.rope_theta > asked.rope_theta,
        "scaling.rope_theta",
        asked.scaling.rope_theta,
        f"the model has {asked.rope_theta:g} already; name a larger one",
    )
    return {"rope_theta": float(asked.scaling.rope_theta)}


def _unchanged(_: _Asked) -> dict[str, Any]:
    return {}


PARAMETERS: dict[ScalingName, Callable[[_Asked], dict[str, Any]]] = {
    ScalingName.pi: _linear,
    ScalingName.ntk: _ntk,
    ScalingName.yarn: _yarn,
    ScalingName.dynamic_ntk: _dynamic,
    ScalingName.theta: _theta,
    ScalingName.longrope: _longrope,
    ScalingName.random_pos: _unchanged,
}


def _require_followed(scaling: ScalingConfig, factor: float, before: Tensor, after: Tensor, kind: str) -> None:
    """A family whose own code reads its base elsewhere would train unscaled and say nothing."""
    moves = scaling.name is ScalingName.theta or (factor > 1 and scaling.name is not ScalingName.random_pos)
    require(
        not (moves and torch.equal(before, after)),
        "scaling.name",
        scaling.name.name,
        f"the frequencies of model_type={kind} do not follow rope_parameters; scaling=clex scales them",
    )
