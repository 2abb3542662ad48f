"""RULER's aggregation tasks (Hsieh et al., 2024): find the most frequent words of a long list.

Common words: a numbered list with ten frequent words among many rare ones. Frequent words: coded words whose k-th has
the share k^-alpha / zeta(alpha), alpha = 2 (zeta(2) = pi^2 / 6). The first is dots; the question is about the next
three.
"""

import math
import string
from itertools import islice

import numpy as np

from clex_train.retrieval.prompts import Ask, Draft, join
from clex_train.retrieval.words import names

NUM_COMMON = 10
NUM_FREQUENT = 3
LONG = 4096
"""Prompt length in tokens from which RULER repeats words more often."""
CODED_LEN = 6
"""Letters of a coded word."""
TOKENS_PER_CODED_WORD = 50
LEAST_WORDS = 80
"""Smallest number of words for which the counts of the first five ranks differ: (1/16 - 1/25) / zeta(2) * 80 > 1."""


def common_words(ask: Ask) -> Draft:
    """Draft a prompt about common words, which appear 30 times and others 3 times (6 and 1 in short texts).

    A unit of filler is one more rare word.
    """
    common_count, other_count = (30, 3) if ask.length >= LONG else (6, 1)
    words, seed = names(ask.rng), int(ask.rng.integers(2**63))
    common, others = list(islice(words, NUM_COMMON)), list[str]()
    opening = "Below is a numbered list of words, some of which appear more often than others. Memorize those."
    lead = f"Answer: The {NUM_COMMON} words that appear most often in the list above are:"
    question = f"Question: What are the {NUM_COMMON} most common words in the list above? {lead}"

    def text(units: int) -> str:
        # Draw each word once, so that more units only add words: the search for the length relies on it.
        others.extend(islice(words, max(0, units - len(others))))
        entries = _shuffled(common * common_count + others[:units] * other_count, seed)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
        return join("\n", opening, listed, question)

    return Draft(tuple(common), text, lead)


def frequent_words(ask: Ask) -> Draft:
    """Draft a prompt about frequent words. A unit of filler is one more word of the text."""
    vocabulary = ["...", *_coded(ask.rng, max(5, ask.length // TOKENS_PER_CODED_WORD))]
    seed = int(ask.rng.integers(2**63))
    shares = np.arange(1, len(vocabulary) + 1) ** -2.0 / (math.pi**2 / 6)
    opening = "Read the coded text below and keep track of how often each coded word appears."
    lead = f"Answer: The {NUM_FREQUENT} most frequent words of the text above are:"
    question = (
        f"Question: Leave the dots '...' aside. What are the {NUM_FREQUENT} most frequent words of the text above? "
        f"{lead}"
    )

    def text(units: int) -> str:
        # Rounded down, so that no rank's count ever decreases with more units.
        counts = ((LEAST_WORDS + units) * shares).astype(int)
        entries = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        return join("\n", opening, " ".join(_shuffled(entries, seed)), question)

    return Draft(tuple(vocabulary[1 : 1 + NUM_FREQUENT]), text, lead)


def _coded(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct words of random lowercase letters."""
    # A dict keeps the order of the draws; a set's order differs between processes.
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(string.ascii_lowercase), CODED_LEN))] = None
    return list(found)


def _shuffled(entries: list[str], seed: int) -> list[str]:
    # A generator of its own: `text` is called many times and must return the same prompt for the same units.
    return [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))]
