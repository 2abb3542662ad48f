"""Bounds of configuration values: largest sensible numbers, and checks that raise `ConfigError`."""

import math
from collections.abc import Mapping

from clex_train.utils.errors import ConfigError

MOST_TOKENS = 2**27
"""Tokens of a sequence, window or prompt: at this length the KV cache of a 7B model takes 64 TiB."""
MOST_SCALE = 2**14
"""Scale factors: the ODE is solved at every integer up to t_max, some 15 s for this many on a CPU."""
MOST_ROPE_THETA = 1e12
MOST_STEPS = 10**9
MOST_RANKS = 2**20
MOST_ITEMS = 1000
"""Length of a list of numbers."""
LONGEST_SHOWN = 80
"""Characters of a refused name that a message shows."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` unless `condition`, on a value that the user set, is true."""
    if not condition:
        raise ConfigError(key, value, remedy)


def shortened(text: str) -> str:
    """Return a text that fits one line: quoted if empty or with unprintable characters, and truncated."""
    shown = text if text.strip() == text != "" and text.isprintable() else repr(text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def require_at_most(settings: object, prefix: str, most: Mapping[str, float]) -> None:
    """Raise `ConfigError` for numbers that are not finite, or larger than any machine can serve.

    `most` maps fields of `settings` to upper bounds. Lists are checked item by item, and for their length.
    """
    for name, bound in most.items():
        value = getattr(settings, name)
        items = value if isinstance(value, list) else [value]
        key = f"{prefix}{name}"
        require(len(items) <= MOST_ITEMS, key, f"[{len(items)} numbers]", f"at most {MOST_ITEMS}")
        for item in items:
            # -inf is below every bound; an int is finite, and may be too large for math.isfinite.
            is_finite = not isinstance(item, float) or math.isfinite(item)
            require(item is None or (is_finite and item <= bound), key, value, f"a finite number, at most {bound:,}")
