"""Frequency tables by transformers' own formulas, for the methods of `scaling.methods` that use them.

    theta(t), attention factor(t) = ROPE_INIT_FUNCTIONS[rope_type](config with factor t and original length L, n = t L)

The formulas run on a copy of the model's config, so they respect partial rotation, `rope_theta` and layer types.
Sources: yarn, arXiv 2309.00071; longrope, arXiv 2402.13753. Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_train.rope.rotary import LayerType
from clex_train.scaling.frequency_table import Frequencies, FrequencyTable, as_grid
from clex_train.scaling.methods.base import ParametersAt, Rope, TGrid
from clex_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from clex_train.rope.patch import RotaryHandle

_KEPT = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConfiguredRope(Rope):
    """RoPE of a model, as its rotary module's `config` describes it."""

    config: Any
    layer_type: LayerType
    """Type of the scaled layers; None if all layers share one RoPE."""

    @property
    def model_type(self) -> str:
        """Model type, for messages."""
        return str(getattr(self.config, "model_type", type(self.config).__name__))

    @property
    def parameters(self) -> dict[str, Any]:
        """The model's own `rope_parameters`; empty if its config has none."""
        every = getattr(self.config, "rope_parameters", None) or {}
        return dict(every if self.layer_type is None else every.get(self.layer_type) or {})

    def update(self, parameters: dict[str, Any]) -> None:
        """Write `rope_parameters` of the scaled layers into the config."""
        every = self.config.rope_parameters
        (every if self.layer_type is None else every[self.layer_type]).update(parameters)

    @property
    def theta(self) -> float:
        """Base of the frequencies, rope_theta; `ConfigError` names a model type whose config has none."""
        theta = self.parameters.get("rope_theta") or getattr(self.config, "rope_theta", None)
        if theta is None:
            raise ConfigError(
                "model_type", self.model_type, "its config names no rope_theta, so no other base replaces it"
            )
        return float(theta)

    def stock_table(self, method: str, t_grid: TGrid, parameters: ParametersAt) -> FrequencyTable:
        """Compute theta(t) and the attention factors; `ConfigError` names a model that is scaled already."""
        _require_plain(self, method)
        grid = as_grid(t_grid)
        thetas, factors = zip(*_rows(self, grid.tolist(), parameters), strict=True)
        return FrequencyTable(grid, torch.stack(thetas), method, attention_factors=torch.tensor(factors).double())


def base_rope(handle: RotaryHandle, own: Frequencies | None = None) -> Rope:
    """Return the RoPE that methods start from: that of the model's config, with the model's `own` scaling."""
    if not len(handle.base_inv_freq):
        # A model without RoPE has no config of one.
        return Rope(handle.base_inv_freq, handle.context_len, own)
    plain, scaled = (handle.base_inv_freq, handle.context_len, own), handle.traits.scaled
    return ConfiguredRope(*plain, config=handle.rotary_config, layer_type=scaled)


def _rows(
    rope: ConfiguredRope, grid: Iterable[float], parameters: ParametersAt
) -> Iterable[tuple[Float[Tensor, " P"], float]]:
    """Yield transformers' (theta, attention factor) for each scale factor."""
    # The caller's config must not change, since its model may still read it.
    config = copy.deepcopy(rope.config)
    config.max_position_embeddings = rope.context_len
    # Phi-3 has it here, where it takes precedence over rope_parameters.
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = rope.context_len
    kept = {key: value for key, value in rope.parameters.items() if key in _KEPT}
    named = {} if rope.layer_type is None else {"layer_type": rope.layer_type}
    for t in grid:
        wanted = {**kept, "original_max_position_embeddings": rope.context_len, **parameters(t)}
        config.rope_parameters = (
            wanted if rope.layer_type is None else {**rope.config.rope_parameters, rope.layer_type: wanted}
        )
        compute = ROPE_INIT_FUNCTIONS[wanted["rope_type"]]
        # `dynamic` and `longrope` depend on the length of the call; the others ignore it.
        theta, factor = compute(config, torch.device("cpu"), seq_len=round(t * rope.context_len), **named)
        yield theta.double(), float(factor)


def _require_plain(rope: ConfiguredRope, method: str) -> None:
    if rope.parameters:
        # `linear` with factor 1 is plain RoPE with the config's base and partial rotation.
        inv_freq = rope.inv_freq
        [(plain, _)] = _rows(rope, [1.0], lambda t: {"rope_type": "linear", "factor": t})
        if plain.shape == inv_freq.shape and torch.allclose(plain, inv_freq.double().cpu(), rtol=1e-5, atol=0):
            return
    raise ConfigError(
        "methods",
        f"[{method}]",
        f"transformers' formula starts from plain RoPE, but model_type={rope.model_type} has "
        f"other frequencies (rope_type={rope.parameters.get('rope_type')}); leave {method} out",
    )
