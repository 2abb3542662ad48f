"""Hold documents out: those whose hash is below a border, and a few at least of a small corpus.

    value = first 8 bytes of blake2b(text), little endian        held out: value < max(share * 2^64, border)

`border` lets the `few(N)` smallest values in, N the number of different texts. So a folder of ten documents, of which
a share of 1 % is none, gives two: the least that has error bars, which are bootstrapped over documents. Where the share
gives as many by itself, it decides alone, and added documents move no other. A higher border may fall as a folder
grows: then documents go from validation to training, and never the other way round.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import nsmallest

from clex_train.utils import log
from data_prep.config import CorpusConfig, CorpusSource
from data_prep.corpus.documents import MAX_WARNINGS, documents
from data_prep.corpus.sources import Unit

logger = log.get(__name__)

MOST = 4
"""Documents that a small corpus is made to hold out, at most."""
LEAST = 2
"""Documents that a bootstrap needs."""
SMALL_BYTES = 256_000_000
"""On disk: a larger corpus is not read once more, the share alone decides."""


@dataclass(frozen=True)
class HeldOut:
    """The rule of a corpus."""

    below: float
    """Documents whose value is below are held out."""
    raised_to: int | None = None
    """Different texts that are held out because the share would give fewer; None: the share decides."""


def few(num_texts: int) -> int:
    """Return how many texts to hold out: a tenth, but at least 2 and at most 4; never more than half."""
    return min(max(LEAST, min(MOST, num_texts // 10)), num_texts // 2)


def rule(corpus: CorpusConfig, units: list[Unit]) -> HeldOut:
    """Choose the rule of a corpus, a function of its content alone.

    A small corpus is read once for it, as far as the `MOST` documents that the share holds out by itself.

    Raises:
        ValueError: as `documents`.
    """
    share = HeldOut(corpus.validation_share * 2.0**64)
    is_small = sum(piece.num_bytes for unit in units for piece in unit.pieces) <= SMALL_BYTES
    if corpus.source is CorpusSource.hub or not is_small or corpus.split_field or not 0 < corpus.validation_share < 1:
        return share
    values: set[int] = set()
    num_held_out = 0
    # Warnings of records that are left out come when the documents are written.
    quiet = Counter({"bad_records": MAX_WARNINGS})
    for piece in (piece for unit in units for piece in unit.pieces):
        for document in documents(piece, corpus, quiet):
            if document.text_hash not in values:
                values.add(document.text_hash)
                num_held_out += document.text_hash < share.below
            if num_held_out == MOST:
                return share
    wanted = few(len(values))
    if num_held_out >= wanted:
        return share
    return HeldOut(nsmallest(wanted, values)[-1] + 1, wanted)
