"""A needle in a haystack (Kamradt, 2023): one sentence that does not belong, inside real text, asked for at the end.

The haystack is the text of the evaluation store's documents. The needle is a number for a name, so that an answer is
right or wrong without a judge: exact match of the first number of the generation.
"""

from clex_train.evaluation.retrieval.haystack import insert
from clex_train.evaluation.retrieval.prompts import Ask, Draft, join
from clex_train.evaluation.retrieval.words import digits, names


def in_documents(ask: Ask) -> Draft:
    """Put the needle at the end of the sentence before the share `ask.depth` of the text's tokens."""
    name, number = next(names(ask.rng)), digits(ask.rng, 6)
    lay = ask.documents.starting_at(ask.rng.random())
    opening = "Read the text below. There will be a question about it."
    lead = f"The secret number of {name} is"
    question = f"What is the secret number of {name}? {lead}"

    def text(units: int) -> str:
        context = insert(lay(units, [ask.depth]), [f"The secret number of {name} is {number}."])
        return join("\n\n", opening, context, question)

    return Draft((number,), text, lead)
