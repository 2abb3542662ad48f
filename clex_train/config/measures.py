"""Measures by teacher forcing: one forward over a prompt with its answer, and no generation."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from clex_train.utils.errors import require


class Measure(Enum):
    """Measures by teacher forcing."""

    forced_passkey = "forced_passkey"
    forced_passkey_noise = "forced_passkey_noise"
    repetition = "repetition"


def check(measures: Sequence[Measure], distances: Sequence[int] | None, num_distractors: int) -> None:
    """Raise `ConfigError` by key for settings from which no prompt can be made."""
    require(
        distances is None or (len(distances) > 0 and all(distance >= 1 for distance in distances)),
        "evaluation.distances",
        distances,
        "one or more distances of at least 1 token",
    )
    require(num_distractors >= 0, "evaluation.num_distractors", num_distractors, "0 or more statements")
    # Without the measure the key would have no effect, and the user would believe that it had.
    used = Measure.repetition in measures
    remedy = "only repetition has distances; set evaluation.measures=[repetition], or leave the key out"
    require(used or distances is None, "evaluation.distances", distances, remedy)
    remedy = "only repetition has distractors; set evaluation.measures=[repetition], or leave the key out"
    require(used or num_distractors == 0, "evaluation.num_distractors", num_distractors, remedy)
