"""Prompts with their answers, as pairs of rows of exactly N tokens that end with the answer.

    forced_passkey        text  statement  text  question  key          against the same prompt with another key
    repetition            text  statement  distractors and text  the same statement up to its number
                          against the same tokens with text in place of the first statement

A statement at the distance D begins D tokens before its second appearance. The passkey sentences are those of
`retrieval.passkey`. Shapes: `N` tokens of a row, `A` answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from clex_train.measures.filler import Filler, continuation
from clex_train.retrieval.passkey import LEAD, NOTICE, statement
from clex_train.retrieval.words import digits, names
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer

QUESTION = f" What is the pass key? {LEAD}"
MOST_DRAWS = 1000
"""Draws of a wrong key until one has as many tokens as the right one."""


class Pair(NamedTuple):
    """Two rows int64 [2, N] that end with `num_scored` answer tokens, and the unit of the bootstrap of both."""

    rows: np.ndarray
    num_scored: int
    group: int


class Frame(Protocol):
    """The fixed parts of a prompt, without filler."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row that are not filler."""
        ...

    @property
    def answer_len(self) -> int:
        """Tokens of the answer, A."""
        ...

    def fits(self, place: float, num_filler: int) -> bool:
        """Return True if the prompt can be made at this place with so much filler."""
        ...

    def pair(self, filler: Filler, rng: np.random.Generator, num_filler: int, place: float, number: int) -> Pair:
        """Build both rows, with the fact at `place`: a depth from 0 to 1, or a distance in tokens."""
        ...


@dataclass(frozen=True)
class PasskeyFrame:
    """Parts of a prompt about a pass key."""

    head: list[int]
    """BOS and notice, as far as there are."""
    fact: list[int]
    question: list[int]
    key: list[int]
    wrong_key: list[int]
    """Another key of as many tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row that are not filler."""
        return len(self.head) + len(self.fact) + len(self.question) + len(self.key)

    @property
    def answer_len(self) -> int:
        """Tokens of the key."""
        return len(self.key)

    def fits(self, place: float, num_filler: int) -> bool:
        """Return True: every depth fits any filler."""
        return num_filler >= 0

    def pair(self, filler: Filler, rng: np.random.Generator, num_filler: int, place: float, number: int) -> Pair:
        """Build the prompt with the right and with the wrong key; `place` is the depth of the statement."""
        text, group = filler.draw(rng, num_filler, number)
        # Inside a sentence, the statement would be broken text that no model was trained on.
        cut = filler.sentence_end(text, round(place * num_filler))
        prompt = [*self.head, *text[:cut], *self.fact, *text[cut:], *self.question]
        rows = np.array([[*prompt, *self.key], [*prompt, *self.wrong_key]], dtype=np.int64)
        return Pair(rows, len(self.key), group)


def passkey_frame(tokenizer: Tokenizer, rng: np.random.Generator, bos: list[int], has_notice: bool) -> PasskeyFrame:
    """Draw a key and a wrong one, and encode the sentences. Raises `ConfigError` when all keys have the same tokens."""
    key = digits(rng, 5)
    right = continuation(tokenizer, f" {key}", QUESTION)
    wrong = next(
        (
            ids
            for other in (digits(rng, 5) for _ in range(MOST_DRAWS))
            # Tokenizers merge digits unevenly, and a key of more tokens would be harder for its length alone.
            if len(ids := continuation(tokenizer, f" {other}", QUESTION)) == len(right) and ids != right
        ),
        None,
    )
    if wrong is None:
        raise ConfigError(
            "evaluation.measures",
            None,
            f"the tokenizer gives no other five-digit key with as many tokens as {key} ({right}); it needs digits",
        )
    # Each part is encoded behind a full stop, as it stands behind the end of a sentence.
    notice = continuation(tokenizer, f" {NOTICE} You will be asked about it.") if has_notice else []
    fact = continuation(tokenizer, f" {statement(key)}")
    return PasskeyFrame([*bos, *notice], fact, continuation(tokenizer, QUESTION), right, wrong)


@dataclass(frozen=True)
class RepetitionFrame:
    """Parts of a text in which a statement appears twice."""

    head: list[int]
    """BOS, if there is one."""
    cue: list[int]
    """The statement up to its number, which says which number is meant."""
    number: list[int]
    """The number, which only the first appearance determines."""
    stop: list[int]
    """The rest of the statement."""
    distractors: list[list[int]]
    """Statements about other names."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row that are not filler: BOS and the second appearance. The others overwrite filler."""
        return len(self.head) + len(self.cue) + len(self.number)

    @property
    def answer_len(self) -> int:
        """Tokens of the number."""
        return len(self.number)

    @property
    def least_distance(self) -> int:
        """Tokens of the statement and the distractors, which stand between the two beginnings."""
        return self.num_tokens - len(self.head) + len(self.stop) + sum(map(len, self.distractors))

    def fits(self, place: float, num_filler: int) -> bool:
        """Return True if the first appearance lies inside the filler, and the distractors behind it."""
        return self.least_distance <= place <= num_filler

    def pair(self, filler: Filler, rng: np.random.Generator, num_filler: int, place: float, number: int) -> Pair:
        """Build the text with and without the first appearance; `place` is the distance in tokens."""
        text, group = filler.draw(rng, num_filler, number)
        row = np.array([*self.head, *text, *self.cue, *self.number], dtype=np.int64)
        second = len(row) - len(self.cue) - len(self.number)
        first = [*self.cue, *self.number, *self.stop]
        # Between the beginnings, so that the distance does not depend on how many tokens the number has.
        start = second - int(place)
        for begin, ids in self._spread(start + len(first), second):
            row[begin : begin + len(ids)] = ids
        # Overwritten instead of inserted: the two rows differ in the statement alone, and no token moves.
        stated = row.copy()
        stated[start : start + len(first)] = first
        return Pair(np.stack([stated, row]), len(self.number), group)

    def _spread(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each distractor with its first token, with equal gaps between them inside [start, stop)."""
        gap = (stop - start - sum(map(len, self.distractors))) // (len(self.distractors) + 1)
        for ids in self.distractors:
            start += gap
            yield start, ids
            start += len(ids)


def repetition_frame(
    tokenizer: Tokenizer, rng: np.random.Generator, bos: list[int], num_distractors: int
) -> RepetitionFrame:
    """Draw a statement and its distractors, and encode them."""
    name, *others = islice(names(rng), num_distractors + 1)
    cue = f" The secret number of {name} is"
    value = f" {digits(rng, 6)}"
    distractors = [f" The secret number of {other} is {digits(rng, 6)}." for other in others]
    return RepetitionFrame(
        bos,
        continuation(tokenizer, cue),
        continuation(tokenizer, value, cue),
        continuation(tokenizer, ".", cue + value),
        [continuation(tokenizer, text) for text in distractors],
    )
