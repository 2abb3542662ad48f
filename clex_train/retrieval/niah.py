"""RULER's needle-in-a-haystack tasks (Hsieh et al., 2024, section 3): several keys, values and queries.

A needle gives a value for a key. Each of `num_keys` keys has `num_values` values at random depths. The question is
about `num_queries` of the keys, and all of their values are expected. The variants are those of the paper's table of
tasks, in our own wording and without its chat templates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from clex_train.retrieval.haystack import Haystack, from_sentences, insert, noise
from clex_train.retrieval.prompts import Ask, Draft, join
from clex_train.retrieval.words import digits, enumerated, names, uuid

Draw = Callable[[np.random.Generator], str]

number: Draw = partial(digits, num_digits=7)


def noise_haystack(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Hide needles in repeated sentences."""
    return noise


def document_haystack(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Hide needles in real text."""
    return ask.documents.starting_at(ask.rng.random())


def needle_haystack(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Hide needles among needles with other keys."""
    return from_sentences(decoys)


@dataclass(frozen=True)
class Needles:
    """One of RULER's variants; call it with an `Ask` to draft a prompt."""

    haystack: Callable[[Ask, Iterator[str]], Haystack]
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    draw_value: Draw = number
    what: str = "number"
    """Word for a value in the question."""
    keys: Callable[[np.random.Generator], Iterator[str]] = names

    def __call__(self, ask: Ask) -> Draft:
        # The order of the draws determines the prompts; changing it changes every published score.
        rng = ask.rng
        others = self.keys(rng)
        keys = list(islice(others, self.num_keys))
        pairs = [(key, self.draw_value(rng)) for key in keys for _ in range(self.num_values)]
        queried = [keys[i] for i in sorted(rng.choice(self.num_keys, self.num_queries, replace=False))]
        # Shuffled, or the values of one key would stand next to each other.
        needles = [self.sentence(*pairs[i]) for i in rng.permutation(len(pairs))]
        depths = sorted(rng.random(len(needles)).tolist())
        # Decoys take the keys that follow, so no decoy has a key of the question.
        lay = self.haystack(ask, (self.sentence(key, self.draw_value(rng)) for key in others))
        answers = tuple(value for key, value in pairs if key in queried)
        question, lead = self.question(queried, len(answers))
        opening = f"Some special magic {self.what}s are hidden in the text below. Memorize them for a question."

        def text(units: int) -> str:
            return join("\n", opening, insert(lay(units, depths), needles), f"{question} {lead}")

        return Draft(answers, text, lead)

    def sentence(self, key: str, value: str) -> str:
        """Write a needle."""
        return f"One of the special magic {self.what}s for {key} is: {value}."

    def question(self, queried: list[str], num_answers: int) -> tuple[str, str]:
        """Write the question, and the beginning of its answer."""
        verb, noun = ("is", self.what) if num_answers == 1 else ("are all", f"{self.what}s")
        subject = f"the special magic {noun} for {enumerated(queried)} in the text above"
        return f"What {verb} {subject}?", f"{subject[0].upper()}{subject[1:]} {verb.split()[0]}"


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """Yield random UUIDs without end."""
    while True:
        yield uuid(rng)
