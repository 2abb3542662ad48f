"""Passkey retrieval: a number of five digits inside repeated sentences that say nothing, asked for at the end.

Two published forms. LM-Infinite (Han et al., 2024) has that of Mohtashami and Jaggi (2023, Landmark attention): an
announcement, filler, the key in a line of its own, filler, the question and the beginning of its answer. InfiniteBench
(Zhang et al., 2024) sets announcement, text and question apart as paragraphs, and the key stands within the text.
The sentences are our own. Exact match: the first number of the generation is the key.
"""

import numpy as np

from clex_train.evaluation.retrieval.prompts import Draft, join

FILLER = ("The hills are brown.", "The sea is grey.", "The snow is white.", "On we walk.", "Up the road and down.")
NOTICE = "One important fact is hidden in the long and unimportant text below. Find it and remember it."


def lm_infinite(rng: np.random.Generator, depth: float) -> Draft:
    """The form of LM-Infinite; the key stands after the share `depth` (0..1) of the filler."""
    key = draw_key(rng)
    question = "What is the pass key? The pass key is"

    def text(units: int) -> str:
        before, after = filler(units, depth)
        return join("\n", f"{NOTICE} You will be asked about it.", before, statement(key), after, question)

    return Draft((key,), text)


def infinitebench(rng: np.random.Generator, depth: float) -> Draft:
    """The form of InfiniteBench; the key stands after the share `depth` (0..1) of the filler."""
    key = draw_key(rng)

    def text(units: int) -> str:
        before, after = filler(units, depth)
        context = join(" ", before, statement(key), after)
        notice = f"{NOTICE} There will be a question about it."
        return join("\n\n", notice, context, "What is the pass key?", "The pass key is")

    return Draft((key,), text)


def draw_key(rng: np.random.Generator) -> str:
    """A number of five digits, the first not 0."""
    return str(rng.integers(10_000, 100_000))


def statement(key: str) -> str:
    """What says the key, twice."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def filler(units: int, depth: float) -> tuple[str, str]:
    """`units` sentences that go round and round, cut after the share `depth` of them."""
    before = round(depth * units)
    return repeated(0, before), repeated(before, units)


def repeated(first: int, last: int) -> str:
    """Sentences first..last-1 of the filler."""
    return " ".join(FILLER[i % len(FILLER)] for i in range(first, last))
