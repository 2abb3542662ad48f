"""RULER's two metrics (Hsieh et al. 2024, arXiv 2404.06654), for the task files that `data_prep benchmark` writes.

lm-eval's own RULER tasks make their prompts and download what these hide; and its metric for questions asks for every
accepted answer where RULER's asks for one. Task files name the functions here.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f]")


def every(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the share of the expected strings that the answer contains, in [0, 1], case ignored."""
    return {"score": sum(_contained(doc, results)) / len(doc["outputs"])}


def any_of(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the answer contains one of the expected strings, else 0, case ignored."""
    return {"score": float(any(_contained(doc, results)))}


def _contained(doc: Mapping[str, Any], results: Sequence[str]) -> list[bool]:
    # RULER's own clean-up, before its search for substrings.
    answer = CONTROL.sub("\n", results[0].strip()).strip().lower()
    return [expected.lower() in answer for expected in doc["outputs"]]
