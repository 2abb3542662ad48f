"""Bounds of fields: the one form in which a value out of range is refused, and the most that can be meant."""

import math
from collections.abc import Mapping

from clex_train.utils.errors import ConfigError

MOST_TOKENS = 2**27
"""Tokens of a row, a window or a prompt: at this length the keys and values of a 7B model fill 64 TiB."""
MOST_SCALE = 2**14
"""Scale factors: the ODE is solved at every integer up to t_max, which takes a quarter of a minute here."""
MOST_ROPE_THETA = 1e12
MOST_STEPS = 10**9
MOST_RANKS = 2**20
MOST_ITEMS = 1000
"""Items of a list of numbers."""
LONGEST_SHOWN = 80
"""Characters of a refused name that the message repeats."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` unless a condition on a value of the user's holds."""
    if not condition:
        raise ConfigError(key, value, remedy)


def shortened(text: str) -> str:
    """Return a text as it can stand in one line: in quotes if it is empty or has what cannot be seen, and not long."""
    shown = text if text.strip() == text != "" and text.isprintable() else repr(text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def require_at_most(settings: object, prefix: str, most: Mapping[str, float]) -> None:
    """Refuse numbers that no machine could serve, and those that are not finite, before anything is made of them.

    `most` has a bound for each field of `settings` that it names; lists are bounded item by item, and in length.
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
