"""An inspection as plain values for JSON: every pair, every layer, every trap."""

import dataclasses
import math
from typing import Any

import torch

from clex_train.inspection import spectra
from clex_train.inspection.difference import Difference
from clex_train.inspection.reading import Reading
from clex_train.inspection.spectra import LayerRope
from clex_train.utils import versions

FORMAT = 1


def as_json(reading: Reading, other: Reading | None = None, difference: Difference | None = None) -> dict[str, Any]:
    """Return plain values about one model, and its difference from another; null stands for infinity."""
    found = {"format": FORMAT, "program": f"{versions.OWN} {versions.own()}", **_model(reading)}
    if other is not None and difference is not None:
        compared = {"other": _model(other), "is_same": difference.is_same, **dataclasses.asdict(difference)}
        found["difference"] = _finite(compared)
    return found


def _model(reading: Reading) -> dict[str, Any]:
    context = reading.context_len
    return {
        "model": reading.name,
        "model_type": reading.model_type,
        "architecture": reading.architecture,
        "length": reading.length,
        "context_len": context and context.length,
        "context_source": context and context.source,
        "field": None if reading.field is None else _finite(dataclasses.asdict(reading.field.facts)),
        "ropes": [_rope(reading, rope) for rope in reading.ropes],
        "layers": [{**dataclasses.asdict(layer), "kind": layer.kind} for layer in reading.layers],
        "engines": [dataclasses.asdict(verdict) for verdict in reading.verdicts],
    }


def _rope(reading: Reading, rope: LayerRope) -> dict[str, Any]:
    used, plain, context = reading.inv_freq(rope), rope.plain, reading.context_len
    reached = None if plain is None or context is None else spectra.contexts(used, plain, context.length)
    return {
        "layer_type": rope.name,
        "rope_type": rope.rope_type,
        "rope_theta": rope.rope_theta,
        "rotary_dim": 2 * rope.num_pairs,
        "is_scaled": rope.is_scaled,
        "follows_length": rope.follows_length,
        "attention_factor": reading.attention_factor(rope),
        "attention_factor_of_config": rope.attention_factor,
        "theta": used.tolist(),
        "theta_of_config": rope.inv_freq.tolist(),
        "wavelength": _list(spectra.wavelengths(used)),
        "factor": _list(None if plain is None else plain / used),
        "context": _list(reached),
        "still_pairs": spectra.still_pairs(used, reading.length),
        "slow_pairs": spectra.slow_pairs(used, reading.length),
    }


def _list(values: torch.Tensor | None) -> list[float | None] | None:
    # JSON has no infinity.
    return None if values is None else [value if math.isfinite(value) else None for value in values.tolist()]


def _finite(values: Any) -> Any:
    """Return nested values with None for infinity."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
