"""LongRoPE: searched factors for each pair, one set up to L and one beyond it (Ding et al., arXiv 2402.13753).

    theta_j(t) = theta_j(1) / short_factor_j for calls of up to L tokens, theta_j(1) / long_factor_j beyond

Shapes: `P` pairs = rotary_dim / 2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from clex_train.scaling.frequency_table import Frequencies, FrequencyTable, as_grid
from clex_train.scaling.methods.base import Rope, ScalingMethod, TGrid
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import BadFile
from clex_train.utils.records import read_json

FACTORS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class LongRope(ScalingMethod):
    """LongRoPE by transformers' formula, attention factor included; a model with its own longrope keeps it."""

    title: ClassVar[str] = "LongRoPE"

    longrope_factors: str | None = None
    """JSON file with `short_factor` and `long_factor`, one number per pair."""

    def table(self, rope: Rope, t_grid: TGrid) -> FrequencyTable:
        """Return the model's own longrope if it has one, else transformers' formula with the factors of the file."""
        if rope.own is not None and rope.own.method == "longrope":
            # The weights were trained with these factors.
            return _sampled(rope.own, as_grid(t_grid))
        remedy = f"model_type={rope.model_type} has no longrope factors of its own; name a JSON file that has them"
        factors = self._factors(rope, remedy)
        return rope.stock_table("longrope", t_grid, lambda t: {"rope_type": "longrope", "factor": t, **factors})

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `longrope` rope type with the factors of the file; `ConfigError` without a file."""
        factors = self._factors(rope, "longrope needs them: name a JSON file with short_factor and long_factor")
        # transformers switches from the short to the long factors at `original_max_position_embeddings`.
        return {
            "rope_type": "longrope",
            "factor": float(factor),
            "original_max_position_embeddings": rope.context_len,
            **factors,
        }

    def _factors(self, rope: Rope, remedy: str) -> dict[str, list[float]]:
        key, path = f"{self.prefix}longrope_factors", self.longrope_factors
        require(path is not None, key, path, remedy)
        return read_longrope_factors(str(path), len(rope.inv_freq), key)


def read_longrope_factors(
    path: str, num_pairs: int, key: str = "evaluation.longrope_factors"
) -> dict[str, list[float]]:
    """Read `{"short_factor": [P], "long_factor": [P]}`; `ConfigError` names the `key`, the file and the fault."""
    try:
        content = read_json(Path(path))
    except (FileNotFoundError, BadFile) as error:
        raise ConfigError(key, path, f"cannot be read as JSON ({error})") from error
    for name in FACTORS:
        values = content.get(name) if isinstance(content, dict) else None
        # The upper bound excludes infinity, which Python's JSON reader accepts.
        good = isinstance(values, list) and all(isinstance(v, int | float) and 0 < v < 1e308 for v in values)
        if not good or len(values) != num_pairs:  # type: ignore[arg-type]
            found = f"{len(values)} entries" if isinstance(values, list) else "none"
            raise ConfigError(
                key,
                path,
                f"{name} is a list of {num_pairs} numbers greater than 0, one for each pair that the model rotates; "
                f"found {found}",
            )
    return {name: content[name] for name in FACTORS}


def _sampled(own: Frequencies, t: Tensor) -> FrequencyTable:
    """Evaluate a model's own spectra on the grid `t` [K]."""
    spectra = [own.at(float(each)) for each in t]
    factors = torch.tensor([spectrum.attention_factor for spectrum in spectra], dtype=torch.float64)
    return FrequencyTable(t, torch.stack([each.inv_freq for each in spectra]), "longrope", attention_factors=factors)


METHOD = LongRope
