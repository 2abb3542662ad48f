"""config.json of a model at one t: `longrope` with one list of factors, which engines read without code of ours.

    original_max_position_embeddings = max_position_embeddings = round(t L), factor 1, short_factor = long_factor = F

With the length served in both places no engine switches lists, borders at L or adds a magnitude sqrt(1 + ln t / ln L):
all of them compute 1 from a ratio of 1. With L in the first, vLLM, SGLang and transformers give three different models.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from clex_train.attention.layer_probe import rotary_attention
from clex_train.model_config.meta_models import model_on_meta
from clex_train.model_config.rope_keys import rope_of, set_rope
from clex_train.rope.probe import find_rotary, rebuild
from clex_train.rope.rotary import LayerType
from clex_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from clex_train.export.factors import FixedRope

LENGTH = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
KEPT = ("mrope_section", "mrope_interleaved", "mscale_all_dim")
"""Keys of `rope_parameters` that attention reads, whatever the rope_type."""
TEMPERATURE = "llama_4_scaling_beta"
"""Key of families that multiply queries by 1 + beta log(1 + floor(position / original_max_position_embeddings))."""
SAME = 1e-6
"""Relative difference of frequencies that float32 buffers leave."""


def rope_parameters(base: PretrainedConfig, rope: FixedRope) -> dict[str, Any]:
    """Return `rope_parameters` of the scaled layers: `longrope` with the factors of one t."""
    factors, magnitude = list(rope.factors), rope.attention_factor
    parameters: dict[str, Any] = {"rope_type": "longrope", "rope_theta": rope.rope_theta}
    share = _partial(base, rope)
    if share is not None:
        parameters[PARTIAL] = share
    parameters |= {"short_factor": factors, "long_factor": list(factors), LENGTH: rope.served_len}
    own = _own_parameters(base, rope)
    # Under latent attention the softmax scale has the factor of a yarn base; frequencies come from the lists alone.
    factor = float(own.get("factor") or 1.0) if own.get("mscale_all_dim") else 1.0
    parameters |= {"factor": factor, "attention_factor": magnitude}
    parameters |= {key: own[key] for key in KEPT if key in own}
    if magnitude != 1.0:
        # vLLM reads these names alone. transformers warns that it does not know them, so they are not written at 1.
        parameters |= {"short_mscale": magnitude, "long_mscale": magnitude}
    return parameters


def changed_keys(base: PretrainedConfig, rope: FixedRope) -> dict[str, Any]:
    """Return the keys of config.json that change, with their new values."""
    values, parameters = rope_of(base), rope_parameters(base, rope)
    if rope.layer_type is not None:
        parameters = {**(values.get("rope_parameters") or {}), rope.layer_type: parameters}
    changed = {"rope_parameters": parameters, "max_position_embeddings": rope.served_len}
    # vLLM serves this many tokens under longrope, and transformers prefers it to the one in rope_parameters.
    return changed | ({LENGTH: rope.served_len} if LENGTH in values else {})


def stock_config(base: PretrainedConfig, rope: FixedRope, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a copy of a base's config with the RoPE of one t.

    Raises:
        ConfigError: the family's own code computes other frequencies from it, or another softmax scale.
    """
    require_no_temperature(base, rope)
    config = _with_head_dim(set_rope(base, changed_keys(base, rope)))
    _require_followed(config, base, rope, trust_remote_code)
    return config


def require_no_temperature(base: PretrainedConfig, rope: FixedRope) -> None:
    """Raise `ConfigError` for a family whose attention has a temperature by position."""
    if _own_parameters(base, rope).get(TEMPERATURE):
        reason = f"its attention reads {LENGTH} for a temperature by position, and an export has another length there"
        raise ConfigError("model_type", base.model_type, f"{reason}, so no file expresses the model at one t")


def _partial(base: PretrainedConfig, rope: FixedRope) -> float | None:
    """Return the share of a head that is rotated, as the family writes it; None if it writes none."""
    text: Any = base.get_text_config()
    own = _own_parameters(base, rope).get(PARTIAL)
    # `proportional` names by it the pairs that rotate at all; F has those that do not, so it applies to whole heads.
    return None if own is None or int(head_dim(text) * own) != rope.rotary_dim else float(own)


def _with_head_dim(config: PretrainedConfig) -> PretrainedConfig:
    """State the dimension of a head in a config whose family leaves it to a formula."""
    text: Any = config.get_text_config()
    # Mixtral's key is null, by which longrope of transformers and of engines multiplies.
    if getattr(text, "head_dim", 0) is None:
        text.head_dim = head_dim(text)
    return config


def _own_parameters(base: PretrainedConfig, rope: FixedRope) -> dict[str, Any]:
    """Return `rope_parameters` of the base's scaled layers."""
    every = getattr(base.get_text_config(), "rope_parameters", None) or {}
    return dict(every if rope.layer_type is None else every.get(rope.layer_type) or {})


def head_dim(text: Any) -> int:
    """Return the dimension of a head, as transformers' formulas read it."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _require_followed(config: PretrainedConfig, base: PretrainedConfig, rope: FixedRope, trust: bool) -> None:
    """Raise `ConfigError` unless a model of this config has the frequencies, magnitude and softmax scales of `rope`."""
    model = _built(config, trust)
    inv_freq, magnitude = _frequencies(model, rope.layer_type)
    pairs = torch.arange(len(rope.factors), dtype=torch.float64) / len(rope.factors)
    expected = rope.rope_theta**-pairs / torch.tensor(rope.factors, dtype=torch.float64)
    if inv_freq.shape != expected.shape:
        raise _not_followed(config, f"{len(inv_freq)} pairs instead of {len(expected)}")
    if not torch.allclose(inv_freq, expected, rtol=SAME, atol=1e-30):
        raise _not_followed(config, "other frequencies")
    if not math.isclose(magnitude, rope.attention_factor, rel_tol=SAME):
        raise _not_followed(config, f"attention factor {magnitude:g}")
    if _softmax_scales(model) != _softmax_scales(_built(base, trust)):
        raise _not_followed(config, "another softmax scale")


def _built(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """Build a model without weights."""
    # A copy: the attention kernels that it names may not fit the meta device.
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    model: nn.Module = model_on_meta(config, trust_remote_code)
    return model


def _frequencies(model: nn.Module, layer_type: LayerType) -> tuple[Tensor, float]:
    """Return inverse frequencies [P] and attention factor of a model's rotary module."""
    # Buffers on the meta device have no values, so the module alone is built again.
    fresh: Any = rebuild(find_rotary(model).module)
    prefix = "" if layer_type is None else f"{layer_type}_"
    factor = getattr(fresh, f"{prefix}attention_scaling", 1.0)
    return getattr(fresh, f"{prefix}inv_freq").double(), float(factor)


def _softmax_scales(model: nn.Module) -> list[float]:
    return [float(module.scaling) for module in rotary_attention(model) if hasattr(module, "scaling")]


def _not_followed(config: PretrainedConfig, reason: str) -> ConfigError:
    return ConfigError(
        "model_type",
        config.model_type,
        f"its code in transformers does not follow rope_type=longrope ({reason}), so no config.json expresses its RoPE",
    )
