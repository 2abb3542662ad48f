"""Find a model's rotary module by its structure, and learn by trying it what it computes and how keys are paired.

A rotary module of transformers maps (x, position_ids[, layer_type]) to (cos, sin) from buffers named `inv_freq` or
`<layer_type>_inv_freq`; a causal LM holds exactly one. Shapes: `B` batch, `S` sequence, `P` pairs = rotary_dim / 2.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from clex_train.rope.rotary import EXPANSIONS, LayerType, ScaledRotary
from clex_train.scaling.spectrum import LAYOUTS, Spectrum, cos_sin
from clex_train.utils.errors import first_line

LOCAL_LAYER_TYPES = ("sliding_attention", "chunked_attention")
# These change their frequencies with the length of the call by themselves; a table of theta(t) would fight with them.
LENGTH_DEPENDENT = ("dynamic", "longrope")
ALIBI = "it has ALiBi biases"
# Keys of these are normalised with a learned weight per component after the rotation, so turning them again is wrong.
NORMALISED_AFTER_ROTATION = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl")


@dataclass(frozen=True)
class Site:
    """Where the rotary module sits: `parent.<name>` is `module`. `parent` is the decoder that calls it."""

    parent: nn.Module
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Traits:
    """What a rotary module computes.

    `base`: the model's own spectrum by layer type (None where there are none); `scaled`: the type that long contexts
    need, the others are local; `expansion`: how P angles become the width of cos (`rotary.EXPANSIONS`);
    `layout`: which components of a key make a pair, None when cached keys cannot be turned; `casts`: whether the stock
    module rounds cos and sin to the dtype of `x`.
    """

    base: dict[LayerType, Spectrum]
    scaled: LayerType
    expansion: str
    layout: str | None
    casts: bool


def find_rotary(model: nn.Module) -> Site:
    """The model's one rotary module; `ValueError` names the model type when there is none or more than one."""
    sites = list(_sites(model))
    config: Any = getattr(model, "config", None)
    if any(isinstance(module, ScaledRotary) for module in model.modules()):
        raise ValueError("install_rotary: this model's rotary module is already replaced; undo() the earlier handle")
    if len(sites) == 1 and has_rotary(model):
        return sites[0]
    kind = getattr(config, "model_type", type(model).__name__)
    if len(sites) > 1:
        names = ", ".join(type(site.module).__name__ for site in sites)
        raise ValueError(f"model_type={kind}: {len(sites)} rotary modules ({names}) where exactly one is expected")
    raise ValueError(
        f"model_type={kind}: no rotary position embedding ({_describe_positions(model)}); use a RoPE model"
    )


def has_rotary(model: nn.Module) -> bool:
    """Whether it has a rotary module, one or more, and uses it."""
    config: Any = getattr(model, "config", None)
    return not getattr(config, "alibi", False) and any(
        _is_rotary(module) or isinstance(module, ScaledRotary) for module in model.modules()
    )


def has_alibi(model: nn.Module) -> bool:
    """Whether a model without rotary module has biases by distance, which know no longest length."""
    return _describe_positions(model) == ALIBI


def require_rotary(config: PretrainedConfig, trust_remote_code: bool = False) -> Traits:
    """Learn what the RoPE of an architecture computes, without weights.

    `ValueError` names the model type without one, or with one that follows the length by itself.
    """
    model = model_on_meta(config, trust_remote_code)
    module = find_rotary(model).module
    require_fixed_frequencies(module, model.config)
    return probe(module, model.config)


def model_on_meta(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights; `ValueError` names a model type that has none, or whose config it cannot be of."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a family's own code raises over sizes that it cannot have
        reason = first_line(error)
        raise ValueError(f"model_type={config.model_type}: no causal language model of it ({reason})") from error


def length_dependent_type(module: nn.Module) -> str | None:
    """Name the rope_type that changes frequencies with the length of a call; None for a fixed RoPE."""
    types = getattr(module, "rope_type", "default")
    for rope_type in types.values() if isinstance(types, dict) else [types]:
        if any(name in str(rope_type) for name in LENGTH_DEPENDENT):
            return str(rope_type)
    return None


def require_fixed_frequencies(module: nn.Module, config: Any) -> None:
    """`ValueError` naming the model type of a rotary module that would fight with a table of theta(t)."""
    rope_type = length_dependent_type(module)
    if rope_type is not None:
        kind = getattr(config, "model_type", type(module).__name__)
        raise ValueError(
            f"rope_type={rope_type} of model_type={kind}: it changes its frequencies with the length by itself; "
            "set rope_type to `default` in rope_parameters of config.json"
        )


def require_frequencies(module: nn.Module, traits: Traits, config: Any) -> None:
    """Raise `ValueError` naming the model type when some frequencies are 0: those pairs do not rotate at any t."""
    own = traits.base[traits.scaled].inv_freq
    still = int((~(own > 0)).sum())
    if still:
        kind, types = getattr(config, "model_type", type(module).__name__), getattr(module, "rope_type", None)
        rope_type = types.get(traits.scaled) if isinstance(types, dict) else types
        raise ValueError(
            f"rope_type={rope_type} of model_type={kind}: {still} of its {len(own)} frequencies are 0, and theta(t) "
            "starts from positive ones; scaling=none trains it and methods=[trained] reads it unscaled"
        )


def spectrum_at_length(module: nn.Module, traits: Traits, num_tokens: int, t: float) -> Spectrum:
    """What a module that follows the length computes for a call of `num_tokens` tokens, its factor over that at L.

    `ValueError` names a module whose cos is not that of the frequencies it then holds.
    """
    fresh = _rebuild(module)
    arguments = (torch.zeros(1, 2, 1), torch.tensor([[1, num_tokens - 1]]))
    cos, _ = fresh(*arguments) if traits.scaled is None else fresh(*arguments, traits.scaled)
    found = _spectrum(fresh, fresh, traits.scaled)
    expected = EXPANSIONS[traits.expansion](cos_sin(torch.ones(1, 1), found.inv_freq)[0]) * found.attention_factor
    if not torch.allclose(expected, cos[:, :1], atol=1e-5):
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        raise ValueError(
            f"rope_type={length_dependent_type(module)} of model_type={kind}: it follows the length in a "
            "way of its own; set rope_type to `default` in rope_parameters of config.json"
        )
    own_factor = traits.base[traits.scaled].attention_factor
    return Spectrum(found.inv_freq, t, found.attention_factor / own_factor)


def probe(module: nn.Module, config: Any) -> Traits:
    """Try the rotary module out; `ValueError` names the model type when its RoPE is of a kind that cannot be scaled."""
    kind = getattr(config, "model_type", type(module).__name__)
    fresh = _rebuild(module)
    types = _layer_types(fresh)
    scaled = _scaled_type(types, kind)
    base = {layer_type: _spectrum(module, fresh, layer_type) for layer_type in types}
    cos, casts = _try_forward(fresh, scaled, kind)
    expansion = _expansion(cos, base[scaled], kind)
    return Traits(base, scaled, expansion, _layout(fresh, config, base[scaled], expansion), casts)


def _sites(model: nn.Module) -> Iterator[Site]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if _is_rotary(child):
                yield Site(parent, name, child)


def _is_rotary(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_buffers(recurse=False)}
    parameters = list(inspect.signature(type(module).forward).parameters)
    return any(name.endswith("inv_freq") for name in names) and parameters[1:3] == ["x", "position_ids"]


def _describe_positions(model: nn.Module) -> str:
    """What a model without a rotary module has instead, in words."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    buffers = {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()}
    source = sys.modules[type(model).__module__]
    if names & {"wpe", "embed_positions", "position_embeddings", "position_embedding"}:
        return "it has learned absolute positions"
    if any("alibi" in name for name in vars(source)) or getattr(getattr(model, "config", None), "alibi", False):
        return ALIBI
    if "embed_positions" in buffers:
        return "it keeps a fixed table of sines in every layer"
    return "no module maps position_ids to cos and sin"


def _rebuild(module: nn.Module) -> nn.Module:
    """The module built again from its config on the CPU: real and in full precision, however the model was loaded."""
    config = getattr(module, "config", None)
    if config is None:
        return copy.deepcopy(module)
    with torch.device("cpu"):
        return type(module)(config)


def _layer_types(module: nn.Module) -> list[LayerType]:
    buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    if "inv_freq" in buffers:
        return [None]
    return [name.removesuffix("_inv_freq") for name in buffers if not name.endswith("original_inv_freq")]


def _scaled_type(types: list[LayerType], kind: str) -> LayerType:
    scaled = [layer_type for layer_type in types if layer_type not in LOCAL_LAYER_TYPES]
    if len(scaled) != 1:
        raise ValueError(f"model_type={kind}: rotary layer types {types}, of which exactly one should be global")
    return scaled[0]


def _spectrum(module: nn.Module, fresh: nn.Module, layer_type: LayerType) -> Spectrum:
    """The model's own frequencies. A buffer that was rounded to bfloat16 or has no data gives way to a fresh one."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    own, rebuilt = (getattr(source, f"{prefix}inv_freq") for source in (module, fresh))
    exact = own if own.dtype in (torch.float32, torch.float64) and not own.is_meta else rebuilt
    factor = getattr(fresh, f"{prefix}attention_scaling", 1.0)
    return Spectrum(exact.detach().cpu().double().clone(), attention_factor=float(factor))


def _try_forward(fresh: nn.Module, layer_type: LayerType, kind: str) -> tuple[Tensor, bool]:
    """cos at positions 0..3 and whether it comes in the dtype of x."""
    result = fresh(*_call(torch.float32, layer_type))
    if not (isinstance(result, tuple) and len(result) == 2 and result[0].dtype == torch.float32):
        raise ValueError(f"model_type={kind}: its rotary module does not return cos and sin")
    return result[0], fresh(*_call(torch.bfloat16, layer_type))[0].dtype == torch.bfloat16


def _call(dtype: torch.dtype, layer_type: LayerType) -> tuple[Any, ...]:
    positions = torch.arange(4)[None]
    arguments = (torch.zeros(1, 4, 1, dtype=dtype), positions)
    return arguments if layer_type is None else (*arguments, layer_type)


def _expansion(cos: Tensor, spectrum: Spectrum, kind: str) -> str:
    expected, _ = cos_sin(torch.arange(4)[None], spectrum.inv_freq)
    for name, expand in EXPANSIONS.items():
        candidate = expand(expected) * spectrum.attention_factor
        if candidate.shape == cos.shape and torch.allclose(candidate, cos, atol=1e-5):
            return name
    raise ValueError(f"model_type={kind}: its cos is not cos(position * inv_freq) in an arrangement that is known")


def _layout(fresh: nn.Module, config: Any, spectrum: Spectrum, expansion: str) -> str | None:
    """Rotate a key with the model's own function and see which layout agrees."""
    function = getattr(sys.modules[type(fresh).__module__], "apply_rotary_pos_emb", None)
    kind = getattr(config, "model_type", "")
    latent = hasattr(config, "qk_rope_head_dim")
    if function is None or latent or kind in NORMALISED_AFTER_ROTATION or not _takes_q_and_k(function):
        return None
    cos, sin = cos_sin(torch.arange(4)[None], spectrum.inv_freq)
    key = torch.linspace(-1, 1, 8 * len(spectrum.inv_freq)).view(1, 1, 4, -1)
    _, rotated = function(key, key, EXPANSIONS[expansion](cos), EXPANSIONS[expansion](sin))
    for name, rotate in LAYOUTS.items():
        if torch.allclose(rotate(key, cos[:, None], sin[:, None]), rotated, atol=1e-5):
            return name
    return None


def _takes_q_and_k(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]
