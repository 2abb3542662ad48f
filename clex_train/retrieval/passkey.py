"""Passkey retrieval: a five-digit number inside meaningless repeated sentences, with a question about it at the end.

There are two published forms. LM-Infinite (Han et al., 2024) uses that of Mohtashami and Jaggi (2023, Landmark
attention), with the key on a line of its own. InfiniteBench (Zhang et al., 2024) separates notice, text and question as
paragraphs, with the key inside the text. The sentences are our own. The first number of the generation must be the key.
"""

from clex_train.retrieval.haystack import noise
from clex_train.retrieval.prompts import Ask, Draft, join
from clex_train.retrieval.words import digits

NOTICE = "One important fact is hidden in the long and unimportant text below. Find it and remember it."
LEAD = "The pass key is"


def lm_infinite(ask: Ask) -> Draft:
    """Draft a prompt in the form of LM-Infinite, with the key after the share `ask.depth` of the filler."""
    key = digits(ask.rng, 5)
    question = f"What is the pass key? {LEAD}"

    def text(units: int) -> str:
        before, after = noise(units, [ask.depth])
        # Ends with the lead of the answer: base models continue a text, and do not answer questions.
        return join("\n", f"{NOTICE} You will be asked about it.", before, statement(key), after, question)

    return Draft((key,), text, LEAD)


def infinitebench(ask: Ask) -> Draft:
    """Draft a prompt in the form of InfiniteBench, with the key after the share `ask.depth` of the filler."""
    key = digits(ask.rng, 5)

    def text(units: int) -> str:
        before, after = noise(units, [ask.depth])
        context = join(" ", before, statement(key), after)
        notice = f"{NOTICE} There will be a question about it."
        return join("\n\n", notice, context, "What is the pass key?", LEAD)

    return Draft((key,), text, LEAD)


def statement(key: str) -> str:
    """Write the sentences that state the key, twice as in the published prompts."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."
