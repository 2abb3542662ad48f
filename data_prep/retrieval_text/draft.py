"""Synthetic documents whose last statement only an earlier statement determines.

`passkey` asks for a number at the end; `repeat` states a random fact twice, among distractors about other things;
`quote` repeats a passage word for word, which teaches copying: nearly half of its tokens follow from the text before.

    ... The pass key is 48213. Remember it. 48213 is the pass key. ... What is the pass key? The pass key is 48213.
    ... The sign of the bell is icy-417. ... The sign of the lake is 58203. ... The sign of the bell is icy-417. ...

The filler between the two statements is uniform in [0, all filler], so short and long distances are equally frequent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from clex_train.retrieval.haystack import LONGEST_SENTENCE, SENTENCE_END, insert
from clex_train.retrieval.passkey import LEAD, statement
from clex_train.retrieval.words import ADJECTIVES, NOUNS, digits
from clex_train.utils.errors import ConfigError
from data_prep.retrieval_text.config import RetrievalKind, RetrievalTextVerb
from data_prep.retrieval_text.filler import Filler

ATTRIBUTES = ("code", "colour", "label", "mark", "name", "number", "price", "sign")
THREE_DIGITS = [str(number) for number in range(100, 1000)]
PARAGRAPH = "\n\n"
MOST_ATTEMPTS = 100
"""Draws of one document until it fits and its filler contains neither its answer nor the beginning of a statement."""


@dataclass(frozen=True)
class Frame:
    """Sentences of a document with their places: shares (0 to 1) of the filler that come before each, ascending."""

    sentences: tuple[str, ...]
    places: tuple[float, ...]
    answer: str
    leads: tuple[str, ...]
    """Beginnings of statements, which the filler must not contain."""
    pair: tuple[int, int]
    """Indices of the statement and of the sentence that repeats it."""


@dataclass(frozen=True)
class Retrieval:
    """A finished document."""

    text: str
    kind: RetrievalKind
    answer: str
    distance: int
    """Characters between the statement and its repetition."""
    sources: tuple[str, ...]
    """Documents that the filler comes from."""


def draft(number: int, config: RetrievalTextVerb, filler: Filler, fits: Callable[[str], bool]) -> Retrieval:
    """Write document `number`, a function of (config.seed, number), the keys of the config and the filler.

    Args:
        number: number of the document, from 0.
        config: lengths, kinds, distractors and seed.
        filler: real text.
        fits: returns True if a text is short enough; one that is not is drawn again.

    Raises:
        ConfigError: no draw fits, or the corpus itself consists of such statements.
    """
    # A generator per document: no document depends on how many were written before it.
    rng = np.random.default_rng([config.seed, number])
    kind = config.kinds[number % len(config.kinds)]
    too_long, leads = 0, tuple[str, ...]()
    for _ in range(MOST_ATTEMPTS):
        num_chars = int(rng.integers(config.min_chars, config.max_chars + 1))
        if kind is RetrievalKind.quote:
            quoted = quote(rng, num_chars, filler)
            if fits(quoted.text):
                return quoted
            too_long += 1
            continue
        frame = FRAMES[kind](rng, config.distractors)
        leads = frame.leads
        # One separator for each sentence and one more, so that the whole stays within num_chars.
        passage = filler.passage(rng, num_chars - sum(len(sentence) + 1 for sentence in frame.sentences) - 1)
        # The filler must not give the answer away, or contradict it.
        if any(words in passage.text for words in (frame.answer, *frame.leads)):
            continue
        text, distance = _fill(passage.text, frame)
        if fits(text):
            return Retrieval(text, kind, frame.answer, distance, passage.sources)
        too_long += 1
    if too_long:
        remedy = f"no {kind.value} document of {config.min_chars} characters fits; lower min_chars or distractors"
        raise ConfigError("max_tokens", config.max_tokens, remedy)
    remedy = f"nearly every passage contains {leads[0]!r} or another statement; take filler from real text"
    raise ConfigError("corpus.name", config.corpus.name, remedy)


def passkey(rng: np.random.Generator, num_distractors: int) -> Frame:
    """Draw a five-digit key, stated at a uniform place and asked for at the end; there are no distractors."""
    key = digits(rng, 5)
    question = f"What is the pass key? {LEAD} {key}."
    return Frame((statement(key), question), (rng.random(), 1.0), key, (LEAD,), (0, 1))


def repeat(rng: np.random.Generator, num_distractors: int) -> Frame:
    """Draw a fact that is stated twice, and distractors at uniform places."""
    leads = _leads(rng, num_distractors + 1)
    answer, *others = _values(rng, num_distractors + 1)
    distance = rng.random()
    first = rng.random() * (1 - distance)
    # Sorted by place only: a stable sort keeps the statement before its repetition.
    placed = [(first, 0), (first + distance, 0)] + [(rng.random(), 1 + i) for i in range(num_distractors)]
    placed.sort(key=lambda pair: pair[0])
    sentences = [f"{lead} {value}." for lead, value in zip(leads, (answer, *others), strict=True)]
    one, two = (at for at, (_, which) in enumerate(placed) if which == 0)
    return Frame(
        tuple(sentences[which] for _, which in placed),
        tuple(place for place, _ in placed),
        answer,
        tuple(leads),
        (one, two),
    )


def quote(rng: np.random.Generator, num_chars: int, filler: Filler) -> Retrieval:
    """Repeat a passage of real text word for word, with other text between: nearly half of the document is copied."""
    size = int(rng.integers(num_chars // 4, num_chars // 2 - len(PARAGRAPH) + 1))
    passage = filler.passage(rng, size)
    between = filler.passage(rng, num_chars - 2 * size - 2 * len(PARAGRAPH))
    parts = [passage.text, between.text, passage.text]
    text = PARAGRAPH.join(part for part in parts if part)
    distance = text.rindex(passage.text) - len(passage.text)
    return Retrieval(text, RetrievalKind.quote, passage.text, distance, (*passage.sources, *between.sources))


FRAMES = {RetrievalKind.passkey: passkey, RetrievalKind.repeat: repeat}


def _fill(filler: str, frame: Frame) -> tuple[str, int]:
    """Insert the sentences into the filler; return the text, and the characters between the pair."""
    gaps = [_gap(filler, round(place * len(filler))) for place in frame.places]
    pieces = [filler[first:last] for first, last in pairwise([0, *gaps, len(filler)])]
    text = insert(pieces, frame.sentences).strip()
    first, second = (frame.sentences[at] for at in frame.pair)
    return text, text.rindex(second) - text.index(first) - len(first)


def _gap(text: str, place: int) -> int:
    """Return the end of a sentence nearest to `place` within a tenth of the text, else the last gap between words."""
    if place in (0, len(text)):
        return place
    # A larger reach would gather statements at few places of a short text, and distances would not be uniform.
    reach = min(LONGEST_SENTENCE, len(text) // 10)
    ends = [match.end() for match in SENTENCE_END.finditer(text, max(0, place - reach), place + reach)]
    if ends:
        return min(ends, key=lambda end: abs(end - place))
    first = max(0, place - LONGEST_SENTENCE)
    # Text without gaps (Chinese, Japanese) may be cut anywhere.
    return max(text.rfind(" ", first, place), text.rfind("\n", first, place)) + 1 or place


def _leads(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct beginnings of statements, such as `The colour of the harbor is`."""
    return [
        f"The {ATTRIBUTES[index % len(ATTRIBUTES)]} of the {NOUNS[index // len(ATTRIBUTES)]} is"
        for index in _distinct(rng, len(ATTRIBUTES) * len(NOUNS), count)
    ]


def _values(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct values of one form: `amber-417`, `58213` or `amber-lantern`."""
    form = int(rng.integers(3))
    if form == 0:
        return [str(10_000 + index) for index in _distinct(rng, 90_000, count)]
    seconds = NOUNS if form == 1 else THREE_DIGITS
    pairs = (divmod(index, len(seconds)) for index in _distinct(rng, len(ADJECTIVES) * len(seconds), count))
    return [f"{ADJECTIVES[one]}-{seconds[two]}" for one, two in pairs]


def _distinct(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """Draw `count` distinct integers below `size`."""
    # Not `permutation`, which would shuffle all 90,000 values for each document.
    chosen: list[int] = rng.choice(size, count, replace=False).tolist()
    return chosen
