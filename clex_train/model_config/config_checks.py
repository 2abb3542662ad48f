"""Validation of RoPE values in config.json: refuse those that no model can have been trained with.

transformers warns about some, computes equal or non-finite frequencies from others, and fails on the rest with an
arithmetic error. `rope_parameters` holds one set of values, or one per layer type.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_train.utils.bounds import MOST_ROPE_THETA, MOST_SCALE, MOST_TOKENS
from clex_train.utils.errors import ConfigError

UNSCALED = "default"
NEEDS_FACTOR = ("linear", "dynamic", "llama3")
LENGTH = "original_max_position_embeddings"
# Wide on purpose: refuse typos and damage, not unusual models.
BOUNDS = {
    "factor": (1.0, MOST_SCALE),
    LENGTH: (1, MOST_TOKENS),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
}
"""Smallest and largest values of RoPE scaling parameters; None lets transformers choose."""


def require_valid_rope(config: PretrainedConfig, source: str, has_own_code: bool = False) -> None:
    """Raise `ConfigError` for an impossible value, in one line that starts with `source`.

    A model with code of its own may define other RoPE types.
    """
    try:
        text: Any = config.get_text_config()
    except ValueError:  # several texts, as of MusicGen, of which none is the model's own
        return
    known = {UNSCALED, getattr(text, "default_rope_type", UNSCALED), *ROPE_INIT_FUNCTIONS}
    for parameters in _parameter_sets(text):
        for key, remedy in _invalid_values(parameters, set() if has_own_code else known):
            raise ConfigError(
                source,
                None,
                f"its config.json has {key}={parameters.get(key)!r} for RoPE, which must be {remedy}; "
                "correct it, or copy the model's config.json again",
            )


def _parameter_sets(text: Any) -> list[dict[str, Any]]:
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):
        theta = getattr(text, "rope_theta", None)
        return [] if theta is None else [{"rope_theta": theta}]
    # A layer type without RoPE has None.
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return nested or [parameters]


def _invalid_values(parameters: dict[str, Any], known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each key with an impossible value, and the requirement that it violates."""
    rope_type = parameters.get("rope_type", UNSCALED)
    if known and (not isinstance(rope_type, str) or rope_type not in known):
        yield "rope_type", f"one of {', '.join(sorted(known))}"
    # With theta = 1 all frequencies are equal; below 1 they grow.
    if "rope_theta" in parameters and not (
        _is_number(theta := parameters["rope_theta"]) and 1 < theta <= MOST_ROPE_THETA
    ):
        yield "rope_theta", f"a number above 1 and at most {MOST_ROPE_THETA:g}"
    share = parameters.get("partial_rotary_factor")
    if share is not None and not (_is_number(share) and 0 < share <= 1):
        yield "partial_rotary_factor", "a number above 0 and at most 1"
    # Leftover scaling keys next to the default type have no effect.
    if rope_type == UNSCALED:
        return
    for key, (least, most) in BOUNDS.items():
        # None lets transformers compute a default, except for `factor` in these types.
        value, is_needed = parameters.get(key), key == "factor" and rope_type in NEEDS_FACTOR
        if (value is not None or is_needed) and not (_is_number(value) and least <= value <= most):
            yield key, f"a number from {least:g} to {most:,}"
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if _is_number(low) and _is_number(high) and not low < high:
        yield "high_freq_factor", f"larger than low_freq_factor={low:g}"
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        if values is not None and not (isinstance(values, list) and all(_is_number(v) and v > 0 for v in values)):
            yield key, "a list of numbers above 0"


def _is_number(value: Any) -> TypeGuard[float]:
    # bool is an int in Python, and JSON has true where a number was meant.
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and (isinstance(value, int) or math.isfinite(value))
