"""Passkey retrieval: a number of five digits inside repeated sentences that say nothing, asked for at the end.

Two published forms. LM-Infinite (Han et al., 2024) has that of Mohtashami and Jaggi (2023, Landmark attention): an
announcement, filler, the key in a line of its own, filler, the question and the beginning of its answer. InfiniteBench
(Zhang et al., 2024) sets announcement, text and question apart as paragraphs, and the key stands within the text.
The sentences are our own. Exact match: the first number of the generation is the key.
"""

from clex_train.evaluation.retrieval.haystack import noise
from clex_train.evaluation.retrieval.prompts import Ask, Draft, join
from clex_train.evaluation.retrieval.words import digits

NOTICE = "One important fact is hidden in the long and unimportant text below. Find it and remember it."
LEAD = "The pass key is"


def lm_infinite(ask: Ask) -> Draft:
    """Build the form of LM-Infinite; the key stands after the share `ask.depth` of the filler."""
    key = digits(ask.rng, 5)
    question = f"What is the pass key? {LEAD}"

    def text(units: int) -> str:
        before, after = noise(units, [ask.depth])
        return join("\n", f"{NOTICE} You will be asked about it.", before, statement(key), after, question)

    return Draft((key,), text, LEAD)


def infinitebench(ask: Ask) -> Draft:
    """Build the form of InfiniteBench; the key stands after the share `ask.depth` of the filler."""
    key = digits(ask.rng, 5)

    def text(units: int) -> str:
        before, after = noise(units, [ask.depth])
        context = join(" ", before, statement(key), after)
        notice = f"{NOTICE} There will be a question about it."
        return join("\n\n", notice, context, "What is the pass key?", LEAD)

    return Draft((key,), text, LEAD)


def statement(key: str) -> str:
    """What says the key, twice."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."
