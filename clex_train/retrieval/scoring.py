"""Scoring of generations against the expected strings, from 0 to 1."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"\d+")


def first_number(generation: str, answers: Sequence[str]) -> float:
    """Return 1 if the first number of the generation is the answer, else 0."""
    # Only the first: a model that lists many numbers has not found the key.
    found = NUMBER.search(generation)
    return float(found is not None and found.group() == answers[0])


def share_contained(generation: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that occur in the generation, ignoring case (RULER's `string_match_all`)."""
    text = generation.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)
