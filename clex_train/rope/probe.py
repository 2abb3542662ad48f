"""Find a model's rotary module by its structure, and learn by probing what it computes and how keys are paired.

A rotary module of transformers maps (x, position_ids[, layer_type]) to (cos, sin) from buffers named `inv_freq` or
`<layer_type>_inv_freq`; a causal LM has exactly one. Shapes: `B` batch, `S` sequence, `P` pairs = rotary_dim / 2.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from clex_train.model_config.context_length import LOCAL_LAYER_TYPES
from clex_train.model_config.meta_models import model_on_meta
from clex_train.rope.layouts import key_layout
from clex_train.rope.rotary import EXPANSIONS, POLAR, LayerType, ScaledRotary
from clex_train.scaling.spectrum import Spectrum, cos_sin
from clex_train.utils.errors import ConfigError

# These change their frequencies with the sequence length by themselves.
LENGTH_DEPENDENT = ("dynamic", "longrope")
ALIBI = "it has ALiBi biases"
# These normalize keys with a learned weight per component after the rotation, which does not commute with rerotating.
NORMALIZED_AFTER_ROTATION = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl")


@dataclass(frozen=True)
class Site:
    """Place of the rotary module: `parent.<name>` is `module`. `parent` is the decoder that calls it."""

    parent: nn.Module
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Traits:
    """Properties of a rotary module.

    `base`: the model's own spectrum by layer type (None for a single RoPE). `scaled`: the layer type that sees the
    whole context; the others are local. `expansion`: how P angles become the width of cos (`rotary.EXPANSIONS`).
    `layout`: the pairing of key components, None when cached keys cannot be rerotated. `casts`: True if the stock
    module rounds cos and sin to the dtype of `x`.
    """

    base: dict[LayerType, Spectrum]
    scaled: LayerType
    expansion: str
    layout: str | None
    casts: bool


def find_rotary(model: nn.Module) -> Site:
    """Find the model's one rotary module; `ConfigError` for none or several, `ValueError` if it is replaced already."""
    sites = list(rotary_sites(model))
    config: Any = getattr(model, "config", None)
    if any(isinstance(module, ScaledRotary) for module in model.modules()):
        raise ValueError("install_rotary: already applied to this model; undo() the earlier handle")
    # A single site may still be unused, as in an ALiBi Falcon.
    if len(sites) == 1 and has_rotary(model):
        return sites[0]
    kind = getattr(config, "model_type", type(model).__name__)
    if len(sites) > 1:
        names = ", ".join(type(site.module).__name__ for site in sites)
        raise ConfigError("model_type", kind, f"{len(sites)} rotary modules ({names}) where exactly one is expected")
    raise ConfigError(
        "model_type", kind, f"no rotary position embedding ({_describe_positions(model)}); use a RoPE model"
    )


def has_rotary(model: nn.Module) -> bool:
    """Return True if the model has at least one rotary module and uses it."""
    config: Any = getattr(model, "config", None)
    # Falcon builds a rotary module even for ALiBi and leaves it unused.
    return not getattr(config, "alibi", False) and any(
        _is_rotary(module) or isinstance(module, ScaledRotary) for module in model.modules()
    )


def has_alibi(model: nn.Module) -> bool:
    """Return True if a model without rotary module has ALiBi biases, which have no maximum length."""
    return _describe_positions(model) == ALIBI


def require_rotary(config: PretrainedConfig, trust_remote_code: bool = False, context_len: int | None = None) -> Traits:
    """Return the traits of an architecture's RoPE, without weights.

    Raises:
        ConfigError: the model type has no RoPE, or other frequencies at `context_len` tokens than in short contexts.
    """
    model = model_on_meta(config, trust_remote_code)
    module = find_rotary(model).module
    traits = probe(module, model.config)
    if context_len is not None:
        require_fixed_frequencies(module, traits, context_len)
    return traits


def length_dependent_type(module: nn.Module) -> str | None:
    """Return the rope_type that changes frequencies with the length of a call; None for a fixed RoPE."""
    types = getattr(module, "rope_type", "default")
    each = types.values() if isinstance(types, dict) else [types]
    return next((str(rope_type) for rope_type in each if follows_length(rope_type)), None)


def follows_length(rope_type: object) -> bool:
    """Return True for a rope_type whose frequencies change with the length of a call."""
    return any(name in str(rope_type) for name in LENGTH_DEPENDENT)


def require_fixed_frequencies(module: nn.Module, traits: Traits, context_len: int) -> None:
    """Raise `ConfigError`, naming the model type, if contexts up to L tokens do not share one set of frequencies.

    A scaling that follows the length is the base of theta(t) through what it uses up to L, where t = 1.
    """
    require_fixed_local_layers(module, traits)
    rope_type, own = length_dependent_type(module), traits.base[traits.scaled]
    found = None if rope_type is None else spectrum_at_length(module, traits, context_len, 1.0)
    # The factor found is relative to the own one.
    if found and (found.attention_factor != 1.0 or not torch.equal(found.inv_freq, own.inv_freq)):
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        raise ConfigError(
            "model.context_len",
            context_len,
            f"rope_type={rope_type} of model_type={kind} has other frequencies there than in short contexts, and "
            "theta(t) starts from one set; name the length up to which they are the same, often "
            "original_max_position_embeddings in config.json",
        )


def require_fixed_local_layers(module: nn.Module, traits: Traits) -> None:
    """Raise `ConfigError` if a RoPE other than that of the scaled layers follows the length."""
    types = getattr(module, "rope_type", None)
    for kind, rope_type in types.items() if isinstance(types, dict) else ():
        if kind != traits.scaled and follows_length(rope_type):
            raise ConfigError("rope_type", f"{rope_type} of {kind}", "local layers see at most L tokens; use `default`")


def require_frequencies(module: nn.Module, traits: Traits, config: Any) -> None:
    """Raise `ConfigError`, naming the model type, if some frequencies are 0: those pairs do not rotate at any t."""
    own = traits.base[traits.scaled].inv_freq
    still = int((~(own > 0)).sum())
    if still:
        kind, types = getattr(config, "model_type", type(module).__name__), getattr(module, "rope_type", None)
        rope_type = types.get(traits.scaled) if isinstance(types, dict) else types
        raise ConfigError(
            "rope_type",
            f"{rope_type} of model_type={kind}",
            f"{still} of its {len(own)} frequencies are 0, but theta(t) "
            "needs positive ones; train it with scaling=none, evaluate it with methods=[trained]",
        )


def spectrum_at_length(module: nn.Module, traits: Traits, num_tokens: int, t: float) -> Spectrum:
    """Return the spectrum that a length-dependent module uses for a call of `num_tokens` tokens.

    Its attention factor is relative to the one at L.

    Raises:
        ConfigError: the module's cos does not match its own frequencies.
    """
    fresh = rebuild(module)
    # The module reads the length from the largest position; position 1 shows the frequencies themselves.
    cos = _cos(call_rotary(fresh, torch.zeros(1, 2, 1), torch.tensor([[1, num_tokens - 1]]), traits.scaled))
    found = _spectrum(fresh, fresh, traits.scaled)
    expected = EXPANSIONS[traits.expansion](cos_sin(torch.ones(1, 1), found.inv_freq)[0]) * found.attention_factor
    if cos is None or not torch.allclose(expected, cos[:, :1], atol=1e-5):
        kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
        raise ConfigError(
            "rope_type",
            f"{length_dependent_type(module)} of model_type={kind}",
            "it follows the length in a way of its own; set rope_type to `default` in rope_parameters of config.json",
        )
    own_factor = traits.base[traits.scaled].attention_factor
    return Spectrum(found.inv_freq, t, found.attention_factor / own_factor)


def probe(module: nn.Module, config: Any) -> Traits:
    """Probe the rotary module; `ConfigError` names a model type whose RoPE cannot be scaled."""
    kind = getattr(config, "model_type", type(module).__name__)
    fresh = rebuild(module)
    types = rotary_layer_types(fresh)
    scaled = _scaled_type(types, kind)
    base = {layer_type: _spectrum(module, fresh, layer_type) for layer_type in types}
    cos, casts = _try_forward(fresh, scaled, kind)
    expansion = _expansion(cos, base[scaled], kind)
    layout = key_layout(fresh, base[scaled], EXPANSIONS[expansion], expansion == POLAR)
    # Rotating the cached keys of such a model would be wrong in any layout.
    return Traits(base, scaled, expansion, None if kind in NORMALIZED_AFTER_ROTATION else layout, casts)


def rotary_sites(model: nn.Module) -> Iterator[Site]:
    """Yield every rotary module of a model; `find_rotary` wants exactly one."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if _is_rotary(child):
                yield Site(parent, name, child)


def _is_rotary(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_buffers(recurse=False)}
    parameters = list(inspect.signature(type(module).forward).parameters)
    return any(name.endswith("inv_freq") for name in names) and parameters[1:3] == ["x", "position_ids"]


def _describe_positions(model: nn.Module) -> str:
    """Describe the positions of a model without a rotary module."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    buffers = {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()}
    source = sys.modules[type(model).__module__]
    # Names of position tables in GPT-2, OPT and their relatives.
    if names & {"wpe", "embed_positions", "position_embeddings", "position_embedding"}:
        return "it has learned absolute positions"
    if any("alibi" in name for name in vars(source)) or getattr(getattr(model, "config", None), "alibi", False):
        return ALIBI
    if "embed_positions" in buffers:
        return "it keeps a fixed table of sines in every layer"
    return "no module maps position_ids to cos and sin"


def rebuild(module: nn.Module) -> nn.Module:
    """Rebuild the module from its config on the CPU, with real data in full precision however the model was loaded."""
    config = getattr(module, "config", None)
    if config is None:
        return copy.deepcopy(module)
    with torch.device("cpu"):
        return type(module)(config)


def rotary_layer_types(module: nn.Module) -> list[LayerType]:
    """List the layer types with frequencies of their own; [None] for a single RoPE."""
    buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    if "inv_freq" in buffers:
        return [None]
    return [name.removesuffix("_inv_freq") for name in buffers if not name.endswith("original_inv_freq")]


def _scaled_type(types: list[LayerType], kind: str) -> LayerType:
    scaled = [layer_type for layer_type in types if layer_type not in LOCAL_LAYER_TYPES]
    if len(scaled) != 1:
        raise ConfigError("model_type", kind, f"rotary layer types {types}; exactly one must be global")
    return scaled[0]


def _spectrum(module: nn.Module, fresh: nn.Module, layer_type: LayerType) -> Spectrum:
    """Return the model's own frequencies."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    own, rebuilt = (getattr(source, f"{prefix}inv_freq") for source in (module, fresh))
    # A buffer that is rounded to bfloat16, on the meta device, or that of the last call gives way to a rebuilt one.
    is_exact = own.dtype in (torch.float32, torch.float64) and not own.is_meta
    exact = own if is_exact and length_dependent_type(module) is None else rebuilt
    factor = getattr(fresh, f"{prefix}attention_scaling", 1.0)
    return Spectrum(exact.detach().cpu().double().clone(), attention_factor=float(factor))


def _try_forward(fresh: nn.Module, layer_type: LayerType, kind: str) -> tuple[Tensor, bool]:
    """Return cos at positions 0..3, complex where the module returns cos + i sin, and if it has the dtype of x."""
    positions = torch.arange(4)[None]
    result = call_rotary(fresh, torch.zeros(1, 4, 1), positions, layer_type)
    if isinstance(result, Tensor) and result.is_complex():
        return result, False
    cos = _cos(result)
    if cos is None or cos.dtype != torch.float32:
        raise ConfigError("model_type", kind, "its rotary module does not return cos and sin")
    rounded = call_rotary(fresh, torch.zeros(1, 4, 1, dtype=torch.bfloat16), positions, layer_type)
    return cos, rounded[0].dtype == torch.bfloat16


def call_rotary(module: nn.Module, x: Tensor, positions: Tensor, layer_type: LayerType) -> Any:
    """Call a rotary module as its family does, with positions [B, S]."""
    named = () if layer_type is None else (layer_type,)
    try:
        return module(x, positions, *named)
    except IndexError:
        # Up to 5.19 families that also read images take time, height and width [3, B, S] only, equal for a text.
        return module(x, positions.expand(3, -1, -1), *named)


def _cos(result: Any) -> Tensor | None:
    """Return cos of what a rotary module returned; None if it is neither cos and sin nor cos + i sin."""
    if isinstance(result, Tensor) and result.is_complex():
        return result.real
    return result[0] if isinstance(result, tuple) and len(result) == 2 else None


def _expansion(cos: Tensor, spectrum: Spectrum, kind: str) -> str:
    # Compared numerically, so that a family with an arrangement of its own is recognized or refused, never guessed.
    expected = cos_sin(torch.arange(4)[None], spectrum.inv_freq)
    for name, expand in EXPANSIONS.items():
        real, imaginary = (expand(half) * spectrum.attention_factor for half in expected)
        candidate = torch.complex(real, imaginary) if name == POLAR else real
        same = candidate.shape == cos.shape and candidate.dtype == cos.dtype
        if same and torch.allclose(candidate, cos, atol=1e-5):
            return name
    raise ConfigError("model_type", kind, "its cos is not cos(position * inv_freq) in a known layout")
