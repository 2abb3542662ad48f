"""Verdict of an engine about a saved model, and the magnitude that engines derive for longrope."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from clex_train.inspection.facts import Facts


@dataclass(frozen=True)
class Trap:
    """Numbers that an engine changes in silence, or a model that it refuses."""

    name: str
    """Stable name, for scripts."""
    text: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """One engine's answer."""

    engine: str
    """Name and version that was read or run."""
    serves: int | None
    """Most tokens without a flag; None for no limit."""
    why: str
    """Source of that length."""
    traps: tuple[Trap, ...]


Engine = Callable[[Facts], Verdict]


def longrope_magnitude(max_len: int, original: int) -> float:
    """Return sqrt(1 + ln(max / original) / ln(original)), LongRoPE's automatic factor of cos and sin."""
    scale = max_len / original
    return 1.0 if scale <= 1 or original <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))


def field_traps(facts: Facts, remedy: str) -> list[Trap]:
    """Return the trap of a CLEX directory whose config.json does not give the frequencies of the table.

    `remedy` may name t as `{t:g}`.
    """
    field = facts.field
    if field is None:
        return []
    if field.refused is not None:
        return [Trap("clex_field_refused", f"refuses config.json: {field.refused}", remedy.format(t=field.t))]
    if field.loaded_t == field.t:
        return []
    loads = "frequencies of no t of the table" if field.loaded_t is None else f"the model at t = {field.loaded_t:g}"
    loads = "plain RoPE, another model" if field.loaded_t == 1.0 else loads
    return [
        Trap(
            "clex_field_ignored",
            f"loads {loads}: theta differs by up to {100 * field.difference:.3g} % (pair {field.pair}) from the CLEX "
            f"table at t = {field.t:g}",
            remedy.format(t=field.t),
        )
    ]
