"""Haystacks, the filler around needles: repeated sentences, other needles, or real text.

A haystack is a function `(units, depths) -> pieces`. It splits `units` of filler at the ascending shares `depths`
(0 to 1), so there is one piece more than depths. `insert` joins the pieces with needles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from clex_train.utils.protocols import Tokenizer

if TYPE_CHECKING:
    from clex_train.token_store.store import TokenStore

Haystack = Callable[[int, Sequence[float]], list[str]]

FILLER = ("The hills are brown.", "The sea is grey.", "The snow is white.", "On we walk.", "Up the road and down.")
SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+")
LONGEST_SENTENCE = 600
"""Characters that a needle may move to the end of a sentence; beyond that, it goes between two words."""


def noise(units: int, depths: Sequence[float]) -> list[str]:
    """Repeat five short sentences; a unit is a sentence."""
    return _cut([FILLER[i % len(FILLER)] for i in range(units)], depths)


def from_sentences(sentences: Iterator[str]) -> Haystack:
    """Make a haystack of the first sentences of an endless iterator; a unit is a sentence."""
    # Remembered, because the haystack is called with several numbers of units.
    drawn: list[str] = []

    def lay(units: int, depths: Sequence[float]) -> list[str]:
        drawn.extend(islice(sentences, max(0, units - len(drawn))))
        return _cut(drawn[:units], depths)

    return lay


class Documents:
    """Real text: the documents of a store's split in order, cyclically; a unit is a token of the store.

    `tokenizer` decodes the store's ids.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = store, tokenizer

    def starting_at(self, share: float) -> Haystack:
        """Return a haystack that starts with the document at the share `share` (0 to 1) of the split's tokens."""
        offsets = self.store.doc_offsets
        document = int(np.searchsorted(offsets, share * self.store.num_tokens, side="right")) - 1
        start = int(offsets[min(document, self.store.num_documents - 1)])

        def lay(units: int, depths: Sequence[float]) -> list[str]:
            ids = self._read(start, units)
            # Decode the whole and cut the text: a cut between ids could split a multi-byte character.
            text = self._text(ids)
            places = [_sentence_end(text, len(self._text(ids[: round(d * len(ids))]))) for d in depths]
            return [text[first:last] for first, last in pairwise([0, *places, len(text)])]

        return lay

    def _read(self, start: int, num_tokens: int) -> np.ndarray:
        """Read `num_tokens` tokens from `start`, continuing at the beginning after the last."""
        parts, missing = [np.empty(0, np.int64)], num_tokens
        while missing:
            taken = self.store.tokens(start, min(start + missing, self.store.num_tokens))
            parts.append(taken.astype(np.int64))
            missing, start = missing - len(taken), 0
        return np.concatenate(parts)

    def _text(self, ids: np.ndarray) -> str:
        """Decode ids, with each document as a paragraph."""
        ends = ids == self.store.eos_id
        documents = [part[part != self.store.eos_id] for part in np.split(ids, np.flatnonzero(ends) + 1)]
        texts = (
            self.tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in documents
        )
        return "\n\n".join(map(str, texts))


def insert(pieces: Sequence[str], needles: Sequence[str]) -> str:
    """Join the pieces with a needle in each gap, separated by whitespace."""
    text = pieces[0]
    for needle, piece in zip(needles, pieces[1:], strict=True):
        # Real text may already begin or end with a newline, which a space would spoil.
        text += (" " if text and not text[-1].isspace() else "") + needle
        text += (" " if piece and not piece[0].isspace() else "") + piece
    return text


def _cut(sentences: Sequence[str], depths: Sequence[float]) -> list[str]:
    places = [0, *(round(depth * len(sentences)) for depth in depths), len(sentences)]
    return [" ".join(sentences[first:last]) for first, last in pairwise(places)]


def _sentence_end(text: str, place: int) -> int:
    """Return the nearest end of a sentence at or before `place`, else the nearest gap between words, else `place`."""
    first = max(0, place - LONGEST_SENTENCE)
    if place == 0:
        return 0
    ends = [match.end() for match in SENTENCE_END.finditer(text, first, place)]
    return ends[-1] if ends else text.rfind(" ", first, place) + 1 or place
