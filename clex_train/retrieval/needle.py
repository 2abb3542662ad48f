"""Needle in a haystack (Kamradt, 2023): one foreign sentence inside real text, with a question about it at the end.

The haystack is the text of the evaluation store. The needle gives a number for a name, so that scoring needs no judge
model: the first number of the generation must match exactly.
"""

from clex_train.retrieval.haystack import insert
from clex_train.retrieval.prompts import Ask, Draft, join
from clex_train.retrieval.words import digits, names


def draft(ask: Ask) -> Draft:
    """Draft a prompt with the needle after the sentence at the share `ask.depth` of the text's tokens."""
    # All draws come before `text`, so that prompts of one index are equal at every depth and length of filler.
    name, number = next(names(ask.rng)), digits(ask.rng, 6)
    lay = ask.documents.starting_at(ask.rng.random())
    opening = "Read the text below. There will be a question about it."
    lead = f"The secret number of {name} is"
    question = f"What is the secret number of {name}? {lead}"

    def text(units: int) -> str:
        context = insert(lay(units, [ask.depth]), [f"The secret number of {name} is {number}."])
        return join("\n\n", opening, context, question)

    return Draft((number,), text, lead)
