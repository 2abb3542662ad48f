"""Filler of retrieval documents: passages at random places of the training documents of a corpus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from clex_train.retrieval.haystack import LONGEST_SENTENCE, SENTENCE_END
from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from data_prep.config import CorpusConfig
from data_prep.corpus.documents import documents
from data_prep.corpus.held_out import rule
from data_prep.corpus.sources import Unit
from data_prep.corpus.utf8 import printable

logger = log.get(__name__)


@dataclass(frozen=True)
class Passage:
    """Consecutive text, and the documents that it comes from, as `file: record n`."""

    text: str
    sources: tuple[str, ...]


class Filler:
    """Texts in UTF-8 with their origins; `passage` reads at random places."""

    def __init__(self, texts: list[bytes], origins: list[str]) -> None:
        assert len(texts) == len(origins) > 0
        self._texts, self._origins = texts, origins
        self._stops = np.cumsum([len(text) for text in texts])

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts."""
        return int(self._stops[-1])

    def passage(self, rng: np.random.Generator, num_chars: int) -> Passage:
        """Read at most `num_chars` characters, at most a word fewer, from the sentence after a random place.

        At the end of a document the next one follows as a new paragraph, after the last the first.
        """
        place = int(rng.integers(self.num_bytes))
        index = int(np.searchsorted(self._stops, place, side="right"))
        within = place - int(self._stops[index]) + len(self._texts[index])
        text = _from_sentence(_decode(self._texts[index], within, num_chars + LONGEST_SENTENCE))
        sources = [self._origins[index]]
        while len(text) < num_chars:
            index = (index + 1) % len(self._texts)
            text = f"{text.rstrip()}\n\n{_decode(self._texts[index], 0, num_chars)}".lstrip()
            sources.append(self._origins[index])
        return Passage(_whole_words(text, num_chars), tuple(sources))


def read(corpus: CorpusConfig, units: list[Unit], max_bytes: int) -> Filler:
    """Read training documents in order, up to `max_bytes` of text.

    Raises:
        InputError: the corpus cannot be read or has no training documents.
    """
    below, splits = rule(corpus, units).below, Counter[str]()
    texts: list[bytes] = []
    origins: list[str] = []
    size = 0
    for piece in (piece for unit in units for piece in unit.pieces):
        for document in documents(piece, corpus, Counter(), below=below):
            splits[document.split] += 1
            # A passage of a held-out document in training would lower its perplexity in evaluation.
            if document.split == "train":
                texts.append(document.content)
                origins.append(f"{printable(piece.path)}: record {document.record}")
                size += document.text_bytes
            if size >= max_bytes:
                logger.info("max_mb=%d reached; the rest of the corpus is skipped", max_bytes // 1_000_000)
                return _filler(corpus, texts, origins, splits)
    return _filler(corpus, texts, origins, splits)


def _filler(corpus: CorpusConfig, texts: list[bytes], origins: list[str], splits: Counter[str]) -> Filler:
    if not texts:
        raise ConfigError("corpus.name", corpus.name, "the corpus has no training documents to take filler from")
    logger.info(
        "filler: %d training documents; %d held-out documents (corpus.validation_share=%g) are left out",
        splits["train"],
        splits["validation"],
        corpus.validation_share,
    )
    return Filler(texts, origins)


def _decode(content: bytes, start: int, num_chars: int) -> str:
    # A character has at most 4 bytes. The ends may lie within one, which `ignore` drops; the rest is valid UTF-8.
    return content[start : start + 4 * (num_chars + 1)].decode("utf-8", "ignore")


def _from_sentence(text: str) -> str:
    """Drop the beginning up to the first end of a sentence, else up to the first gap between words."""
    if end := SENTENCE_END.search(text, 0, LONGEST_SENTENCE):
        return text[end.end() :]
    gap = text.find(" ", 0, LONGEST_SENTENCE)
    if gap >= 0:
        return text[gap + 1 :]
    # Chinese and Japanese may begin at any character. A short text is the end of the last word of a document.
    return text if len(text) > LONGEST_SENTENCE else ""


def _whole_words(text: str, num_chars: int) -> str:
    """Cut after the last word that ends within `num_chars` characters."""
    if len(text) <= num_chars or text[num_chars].isspace():
        return text[:num_chars].rstrip()
    last_gap = max(text.rfind(" ", 0, num_chars), text.rfind("\n", 0, num_chars))
    # Without any gap (Chinese, Japanese), a cut between two characters is as good.
    return text[: last_gap if last_gap > 0 else num_chars].rstrip()
