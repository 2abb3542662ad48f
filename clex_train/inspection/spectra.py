"""Frequencies that a model's rotary modules compute, by layer type, without weights.

    theta_j = 2 pi / wavelength_j,    plain_j = rope_theta^(-2j / d),    factor_j = plain_j / theta_j

The module is rebuilt from the config on the CPU, as transformers builds it on loading, and called with the last
position of a sequence: a RoPE that follows the length (dynamic, longrope) then holds the frequencies of that length.
Shapes: `P` pairs, d = 2 P the rotary dimension.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from clex_train.rope import probe
from clex_train.rope.rotary import LayerType
from clex_train.utils.errors import ConfigError, first_line

STILL = 1e-3
"""Radians: a pair that turns by less over a whole sequence never turns."""
SAME = 1e-5
"""Relative difference of frequencies that is rounding: they are float32."""


@dataclass(frozen=True, eq=False)
class LayerRope:
    """RoPE of the layers of one type, at one length."""

    name: LayerType
    """Layer type, or the path of the module in a model with several; None if all layers share one RoPE."""
    parameters: dict[str, Any]
    """`rope_parameters` of these layers, as transformers reads them."""
    rope_type: str
    inv_freq: Float64[Tensor, " P"]
    attention_factor: float
    """Multiplies cos and sin."""
    width: int | None
    """Components of cos, or of cos + i sin; None if the module returns something else."""
    is_complex: bool = False
    """True for one tensor cos + i sin."""

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.inv_freq)

    @property
    def follows_length(self) -> bool:
        """True if the frequencies change with the length of a call."""
        return probe.follows_length(self.rope_type)

    @property
    def rope_theta(self) -> float | None:
        """Base of the plain frequencies; None if the config names none."""
        theta = self.parameters.get("rope_theta")
        return None if theta is None else float(theta)

    @property
    def plain(self) -> Float64[Tensor, " P"] | None:
        """Plain frequencies of the base; None without one."""
        if self.rope_theta is None:
            return None
        return self.rope_theta ** (-torch.arange(self.num_pairs, dtype=torch.float64) / self.num_pairs)

    @property
    def is_scaled(self) -> bool:
        """True if frequencies or magnitude differ from plain RoPE's, at this length."""
        plain = self.plain
        is_plain = plain is not None and bool(torch.allclose(self.inv_freq, plain, rtol=SAME, atol=0))
        return not is_plain or self.attention_factor != 1


def read(model: nn.Module, length: int) -> tuple[LayerRope, ...]:
    """Read the RoPE of every layer type for a sequence of `length` tokens.

    Raises:
        ConfigError: no rotary module, or one that cannot be rebuilt from the config or called.
    """
    if not probe.has_rotary(model):
        # Its message names what the model has instead.
        probe.find_rotary(model)
    known = {id(site.module) for site in probe.rotary_sites(model)}
    sites = [(name, module) for name, module in model.named_modules() if id(module) in known]
    found = [rope for name, module in sites for rope in _ropes(module, length, "" if len(sites) == 1 else name)]
    return tuple(_distinct(found))


def wavelengths(inv_freq: Float64[Tensor, " P"]) -> Float64[Tensor, " P"]:
    """Return the tokens of a full turn of each pair; inf where the frequency is 0."""
    return 2 * math.pi / inv_freq


def still_pairs(inv_freq: Float64[Tensor, " P"], length: int) -> list[int]:
    """List pairs that never turn: by less than `STILL` radians over `length` tokens."""
    return (inv_freq * length < STILL).nonzero().flatten().tolist()


def slow_pairs(inv_freq: Float64[Tensor, " P"], length: int) -> list[int]:
    """List pairs that turn, but not once in `length` tokens."""
    angle = inv_freq * length
    return ((angle >= STILL) & (angle < 2 * math.pi)).nonzero().flatten().tolist()


def contexts(inv_freq: Float64[Tensor, " P"], plain: Float64[Tensor, " P"], context_len: int) -> Float64[Tensor, " P"]:
    """Return the tokens after which each pair reaches a phase that plain RoPE does not reach in `context_len` tokens.

    inf for a pair that plain RoPE turns once within `context_len`: it has seen every phase.
    """
    reached = context_len * plain / inv_freq
    return torch.where(plain * context_len >= 2 * math.pi, math.inf, reached)


def relative_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return |one / other - 1| by pair: 0 where both are 0, inf where one of them is."""
    ratio = torch.where((one == 0) & (other == 0), torch.ones_like(other), one / other)
    return torch.where((one == 0) != (other == 0), torch.full_like(ratio, torch.inf), (ratio - 1).abs())


def _ropes(module: nn.Module, length: int, path: str) -> Iterator[LayerRope]:
    """Yield the RoPE of each layer type of one rotary module."""
    kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    try:
        fresh = probe.rebuild(module)
        for layer_type in probe.rotary_layer_types(fresh):
            yield _rope(fresh, layer_type, length, path)
    except Exception as error:  # a model's own code raises what it likes
        raise ConfigError(
            "model_type", kind, f"its rotary module cannot be built from the config and called ({first_line(error)})"
        ) from error


def _rope(fresh: nn.Module, layer_type: LayerType, length: int, path: str) -> LayerRope:
    result = probe.call_rotary(fresh, torch.zeros(1, 2, 1), torch.tensor([[0, length - 1]]), layer_type)
    prefix = "" if layer_type is None else f"{layer_type}_"
    parameters = _parameters(fresh, layer_type)
    types = getattr(fresh, "rope_type", None)
    rope_type = types.get(layer_type) if isinstance(types, dict) else types
    # Families that turn complex numbers return one tensor instead of cos and sin.
    is_complex = isinstance(result, Tensor) and result.is_complex()
    width = result[0].shape[-1] if isinstance(result, tuple) or is_complex else None
    shared_factor = getattr(fresh, "attention_scaling", 1.0)
    return LayerRope(
        name=".".join(filter(None, (path, layer_type))) or None,
        parameters=parameters,
        rope_type=str(rope_type or parameters.get("rope_type") or "default"),
        inv_freq=getattr(fresh, f"{prefix}inv_freq").detach().double(),
        attention_factor=float(getattr(fresh, f"{prefix}attention_scaling", shared_factor)),
        width=width,
        is_complex=is_complex,
    )


def _parameters(fresh: nn.Module, layer_type: LayerType) -> dict[str, Any]:
    config: Any = getattr(fresh, "config", None)
    every = getattr(config, "rope_parameters", None) or {}
    found = every if layer_type is None else every.get(layer_type)
    known = dict(found or {})
    # Code from a hub repository may keep the base where transformers 4 did.
    theta = getattr(config, "rope_theta", None)
    return known if theta is None else {"rope_theta": theta, **known}


def _distinct(ropes: list[LayerRope]) -> Iterator[LayerRope]:
    """Yield those that differ from the ones before: a model may hold a module for each of many layers."""
    seen: list[LayerRope] = []
    for rope in ropes:
        if not any(_is_same(rope, other) for other in seen):
            seen.append(rope)
            yield rope


def _is_same(one: LayerRope, other: LayerRope) -> bool:
    types = {(rope.rope_type, rope.attention_factor, rope.width) for rope in (one, other)}
    # Layer types stay apart even if equal: engines treat them by name.
    return len(types) == 1 and "." in str(one.name) and torch.equal(one.inv_freq, other.inv_freq)
