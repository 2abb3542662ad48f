"""Text around the facts of forced prompts, as token ids, so that every prompt of a cell has exactly its length.

Parts are encoded one by one, each as it reads behind the part before it, and joined as ids. A part begins with a space,
at which tokenizers split, so the ids are those of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from clex_train.retrieval.haystack import FILLER
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer

if TYPE_CHECKING:
    from clex_train.token_store.store import TokenStore

REACH = 64
"""Tokens by which a place may move back to the end of a sentence."""
SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', ".'", ".\u201d", "!\u201d", "?\u201d")


def continuation(tokenizer: Tokenizer, text: str, before: str = ".") -> list[int]:
    """Encode `text` as it reads behind `before`, without special tokens.

    Raises `ConfigError` when the tokenizer joins the end of `before` with the beginning of `text`.
    """
    # The text alone would begin with a marker of the start in tokenizers of the SentencePiece kind.
    start = _encode(tokenizer, before)
    whole = _encode(tokenizer, before + text)
    if whole[: len(start)] != start or len(whole) == len(start):
        raise ConfigError(
            "evaluation.measures",
            None,
            f"the tokenizer does not split between {before[-20:]!r} and {text[:20]!r}, so prompts of an exact length "
            "cannot be made; use evaluation.tasks",
        )
    return whole[len(start) :]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


class Filler(Protocol):
    """Source of text around a fact."""

    def draw(self, rng: np.random.Generator, num_tokens: int, number: int) -> tuple[np.ndarray, int]:
        """Return ids int64 [num_tokens] for prompt `number`, and the unit of the bootstrap that they belong to."""
        ...

    def sentence_end(self, ids: np.ndarray, place: int) -> int:
        """Return the nearest place at or before `place` that follows the end of a sentence, else `place`."""
        ...


@dataclass(frozen=True)
class SentenceEnds:
    """Finds the ends of sentences among token ids."""

    tokenizer: Tokenizer = field(repr=False)
    _known: dict[int, bool] = field(default_factory=dict, repr=False)

    def sentence_end(self, ids: np.ndarray, place: int) -> int:
        """Return the nearest place at or before `place` that follows the end of a sentence, else `place`."""
        for end in range(place, max(0, place - REACH), -1):
            if self._ends(int(ids[end - 1])):
                return end
        return place

    def _ends(self, token: int) -> bool:
        # Remembered, since decoding is slow and a vocabulary has few tokens that end a sentence.
        if token not in self._known:
            self._known[token] = str(self.tokenizer.decode([token])).rstrip().endswith(SENTENCE_ENDS)
        return self._known[token]


@dataclass(frozen=True)
class HeldOutText(SentenceEnds):
    """Spans of held-out documents, each inside one document of at least `least` tokens besides BOS and EOS.

    Raises `ConfigError` when there is none.
    """

    store: TokenStore = field(kw_only=True, repr=False)
    least: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if not len(self._documents):
            longest = int(np.diff(self.store.doc_offsets).max(initial=0))
            raise ConfigError(
                "evaluation.measures",
                None,
                f"none of the {self.store.num_documents} held-out documents has {self.least} tokens for the prompts "
                f"(the longest has {longest}, BOS and EOS included); name shorter evaluation.task_lengths, another "
                "store, or forced_passkey_noise",
            )

    def draw(self, rng: np.random.Generator, num_tokens: int, number: int) -> tuple[np.ndarray, int]:
        """Return ids int64 [num_tokens] of a random document that end a sentence, and the document's index."""
        documents, offsets = self._documents, self.store.doc_offsets
        document = int(documents[rng.integers(len(documents))])
        # Neither BOS nor EOS: inside a prompt they would end its text.
        first, last = int(offsets[document]) + self.store.bos, int(offsets[document + 1]) - 1
        stop = int(rng.integers(first + num_tokens, last + 1))
        reach = min(REACH, stop - num_tokens - first)
        ids = self.store.tokens(stop - num_tokens - reach, stop).astype(np.int64)
        end = max(num_tokens, self.sentence_end(ids, len(ids)))
        return ids[end - num_tokens : end], document

    @cached_property
    def _documents(self) -> np.ndarray:
        """Documents that are long enough, int64, ascending."""
        return np.flatnonzero(np.diff(self.store.doc_offsets) >= self.least + self.store.bos + 1)


@dataclass(frozen=True)
class Noise(SentenceEnds):
    """Five short sentences, repeated."""

    def draw(self, rng: np.random.Generator, num_tokens: int, number: int) -> tuple[np.ndarray, int]:
        """Return ids int64 [num_tokens] that end a sentence, and the prompt's number."""
        once = np.array(continuation(self.tokenizer, "".join(f" {sentence}" for sentence in FILLER)), dtype=np.int64)
        total = -(-num_tokens // len(once)) * len(once)
        # The cut is at the beginning, so that the text ends with a whole sentence.
        return np.resize(once, total)[total - num_tokens :], number
