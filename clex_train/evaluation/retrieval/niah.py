"""RULER's needles in a haystack (Hsieh et al., 2024, section 3): several keys, several values, several questions.

A needle gives a value for a key. `num_keys` keys have `num_values` values each, at random depths; `num_queries` keys
are asked for, and every value of each counts. The haystack is repeated sentences, real text, or other needles. The
forms are those of the paper's table of tasks, in words of our own, without its chat templates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from clex_train.evaluation.retrieval.haystack import Haystack, insert, noise, of_sentences
from clex_train.evaluation.retrieval.prompts import Ask, Draft, join
from clex_train.evaluation.retrieval.words import digits, enumerated, names, uuid

Draw = Callable[[np.random.Generator], str]

number: Draw = partial(digits, num_digits=7)


def in_noise(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Repeated sentences."""
    return noise


def in_documents(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Real text."""
    return ask.documents.starting_at(ask.rng.random())


def in_needles(ask: Ask, decoys: Iterator[str]) -> Haystack:
    """Needles of other keys."""
    return of_sentences(decoys)


@dataclass(frozen=True)
class Needles:
    """One of RULER's variants, called with an `Ask`."""

    haystack: Callable[[Ask, Iterator[str]], Haystack]
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    draw_value: Draw = number
    what: str = "number"
    """What the question calls a value."""
    keys: Callable[[np.random.Generator], Iterator[str]] = names

    def __call__(self, ask: Ask) -> Draft:
        rng = ask.rng
        others = self.keys(rng)
        keys = list(islice(others, self.num_keys))
        pairs = [(key, self.draw_value(rng)) for key in keys for _ in range(self.num_values)]
        asked = [keys[i] for i in sorted(rng.choice(self.num_keys, self.num_queries, replace=False))]
        needles = [self.sentence(*pairs[i]) for i in rng.permutation(len(pairs))]
        depths = sorted(rng.random(len(needles)).tolist())
        lay = self.haystack(ask, (self.sentence(key, self.draw_value(rng)) for key in others))
        answers = tuple(value for key, value in pairs if key in asked)
        question, lead = self.question(asked, len(answers))
        opening = f"Some special magic {self.what}s are hidden in the text below. Memorize them for a question."

        def text(units: int) -> str:
            return join("\n", opening, insert(lay(units, depths), needles), f"{question} {lead}")

        return Draft(answers, text, lead)

    def sentence(self, key: str, value: str) -> str:
        """A needle."""
        return f"One of the special magic {self.what}s for {key} is: {value}."

    def question(self, asked: list[str], num_answers: int) -> tuple[str, str]:
        """Return what is asked, and the beginning of the answer."""
        verb, noun = ("is", self.what) if num_answers == 1 else ("are all", f"{self.what}s")
        subject = f"the special magic {noun} for {enumerated(asked)} in the text above"
        return f"What {verb} {subject}?", f"{subject[0].upper()}{subject[1:]} {verb.split()[0]}"


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """Keys without end."""
    while True:
        yield uuid(rng)
