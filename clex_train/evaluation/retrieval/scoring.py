"""How a generation is compared with what was expected: a share of 1, whole or in parts."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"\d+")


def first_number(generation: str, answers: Sequence[str]) -> float:
    """1 if the first number of the generation is the answer, else 0: exact match of passkeys."""
    found = NUMBER.search(generation)
    return float(found is not None and found.group() == answers[0])


def share_contained(generation: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the generation, upper and lower case alike (RULER's `string_match_all`)."""
    text = generation.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)
