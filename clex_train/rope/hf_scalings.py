"""Frequency tables by transformers' own formulas: linear, dynamic, yarn, longrope.

    theta(t), attention factor(t) = ROPE_INIT_FUNCTIONS[rope_type](config with factor t and original length L, n = t L)

The formulas run on a copy of the model's own config, so partial rotary embeddings, `rope_theta` and layer types count.
Sources: yarn, arXiv 2309.00071; longrope, arXiv 2402.13753. Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_train.rope.rotary import LayerType
from clex_train.scaling.table import FrequencyTable, as_grid
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import BadFile
from clex_train.utils.records import read_json

LONGROPE_KEYS = ("short_factor", "long_factor")
_KEPT = ("rope_theta", "partial_rotary_factor")

ParametersAt = Callable[[float], dict[str, Any]]


@dataclass(frozen=True)
class ConfiguredRope:
    """The RoPE of a model as its rotary module's `config` describes it, `layer_type` being the one that is scaled."""

    config: Any
    layer_type: LayerType
    context_len: int
    """L in tokens."""

    @property
    def model_type(self) -> str:
        """The family, for messages."""
        return str(getattr(self.config, "model_type", type(self.config).__name__))

    @property
    def parameters(self) -> dict[str, Any]:
        """The model's own `rope_parameters`; empty where its config has none."""
        every = getattr(self.config, "rope_parameters", None) or {}
        return dict(every if self.layer_type is None else every.get(self.layer_type) or {})

    @property
    def theta(self) -> float:
        """Its base, rope_theta; `ValueError` names the model type where the config does not say it."""
        theta = self.parameters.get("rope_theta") or getattr(self.config, "rope_theta", None)
        if theta is None:
            raise ConfigError(
                "model_type", self.model_type, "its config names no rope_theta, so no other base replaces it"
            )
        return float(theta)


def linear_table(rope: ConfiguredRope, inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float]) -> FrequencyTable:
    """Position interpolation, which is what transformers calls linear."""
    return _table(rope, inv_freq, t_grid, "pi", lambda t: {"rope_type": "linear", "factor": t})


def yarn_table(rope: ConfiguredRope, inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float]) -> FrequencyTable:
    """YaRN of factor t, with its attention factor 0.1 ln t + 1."""
    return _table(rope, inv_freq, t_grid, "yarn", lambda t: {"rope_type": "yarn", "factor": t})


def dynamic_table(
    rope: ConfiguredRope, inv_freq: Float[Tensor, " P"], t_grid: Tensor | list[float], factor: float | None = None
) -> FrequencyTable:
    """Dynamic NTK scaling at t L tokens: the base grows by (factor t - factor + 1)^(d / (d - 2)); factor None is t."""
    return _table(rope, inv_freq, t_grid, "dynamic_ntk", lambda t: {"rope_type": "dynamic", "factor": factor or t})


def longrope_table(
    rope: ConfiguredRope,
    inv_freq: Float[Tensor, " P"],
    t_grid: Tensor | list[float],
    factors: dict[str, list[float]],
) -> FrequencyTable:
    """LongRoPE: theta_j(1) / short_factor_j up to L tokens, / long_factor_j beyond, attention factor by t."""
    return _table(rope, inv_freq, t_grid, "longrope", lambda t: {"rope_type": "longrope", "factor": t, **factors})


def read_longrope_factors(
    path: str, num_pairs: int, asked_by: str = "evaluation.longrope_factors"
) -> dict[str, list[float]]:
    """`{"short_factor": [P], "long_factor": [P]}` of a JSON file; `ValueError` names the file and what is wrong."""
    try:
        content = read_json(Path(path))
    except (FileNotFoundError, BadFile) as error:
        raise ConfigError(asked_by, path, f"cannot be read as JSON ({error})") from error
    for key in LONGROPE_KEYS:
        values = content.get(key) if isinstance(content, dict) else None
        good = isinstance(values, list) and all(isinstance(v, int | float) and 0 < v < 1e308 for v in values)
        if not good or len(values) != num_pairs:  # type: ignore[arg-type]
            found = f"{len(values)} entries" if isinstance(values, list) else "none"
            raise ConfigError(
                asked_by,
                path,
                f"{key} is a list of {num_pairs} numbers greater than 0, one for "
                f"each pair that the model rotates; found {found}",
            )
    return {key: content[key] for key in LONGROPE_KEYS}


def _table(
    rope: ConfiguredRope, inv_freq: Tensor, t_grid: Tensor | list[float], method: str, parameters: ParametersAt
) -> FrequencyTable:
    """A row for every t; `ValueError` names a model whose frequencies are not those that the formula starts from."""
    _require_plain(rope, inv_freq, method)
    grid = as_grid(t_grid)
    thetas, factors = zip(*_rows(rope, grid.tolist(), parameters), strict=True)
    return FrequencyTable(grid, torch.stack(thetas), method, attention_factors=torch.tensor(factors).double())


def _rows(
    rope: ConfiguredRope, grid: Iterable[float], parameters: ParametersAt
) -> Iterable[tuple[Float[Tensor, " P"], float]]:
    """(theta, attention factor) of transformers for each scale factor."""
    config = copy.deepcopy(rope.config)
    config.max_position_embeddings = rope.context_len
    # Phi-3 keeps it here, and there it has precedence over what rope_parameters say.
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
        theta, factor = compute(config, torch.device("cpu"), seq_len=round(t * rope.context_len), **named)
        yield theta.double(), float(factor)


def _require_plain(rope: ConfiguredRope, inv_freq: Tensor, method: str) -> None:
    if rope.parameters:
        [(plain, _)] = _rows(rope, [1.0], lambda t: {"rope_type": "linear", "factor": t})
        if plain.shape == inv_freq.shape and torch.allclose(plain, inv_freq.double().cpu(), rtol=1e-5, atol=0):
            return
    raise ConfigError(
        "methods",
        f"[{method}]",
        f"transformers' formula starts from plain RoPE, and model_type={rope.model_type} has "
        f"other frequencies (rope_type={rope.parameters.get('rope_type')}); leave {method} out",
    )
