"""RULER's variable tracking (Hsieh et al., 2024): a chain of assignments, hidden in order in repeated sentences.

The first variable is assigned a number, each next one the variable before it. The question is about all variables with
that number.
"""

import string

import numpy as np

from clex_train.retrieval.haystack import insert, noise
from clex_train.retrieval.prompts import Ask, Draft, join
from clex_train.retrieval.words import digits

NUM_HOPS = 4
NAME_LEN = 5


def variable_tracking(ask: Ask) -> Draft:
    """Draft a prompt with one chain of four hops at random depths."""
    rng = ask.rng
    variables, value = _variables(rng, NUM_HOPS + 1), digits(rng, 5)
    sources = [value, *(f"VAR {name}" for name in variables)]
    chain = [f"VAR {name} = {source}." for name, source in zip(variables, sources, strict=False)]
    # Sorted, so that every assignment comes after the one that it refers to.
    depths = sorted(rng.random(len(chain)).tolist())
    opening = "Memorize and follow the chain of variable assignments hidden in the text below."
    lead = (
        f"Answer: By the chain of assignments in the text above, {len(variables)} variables have the value {value}, "
        "they are:"
    )
    question = f"Question: Which variables have the value {value} in the text above? {lead}"
    return Draft(
        tuple(variables), lambda units: join("\n", opening, insert(noise(units, depths), chain), question), lead
    )


def _variables(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct names of five capital letters."""
    # A dict keeps the order of the draws; a set's order differs between processes.
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(string.ascii_uppercase), NAME_LEN))] = None
    return list(found)
