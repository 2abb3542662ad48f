"""Split rule: hold out documents whose hash is below a limit, and at least a few of a small corpus.

    value = first 8 bytes of blake2b(text), little endian        held out: value < max(share * 2^64, limit)

`limit` admits the `few(N)` smallest values of N distinct texts. A folder of ten documents, of which 1 % is none, then
holds out two, the least for error bars (they are bootstrapped over documents). If the share already gives as many, it
decides alone, and adding documents moves no other. A raised limit may fall as a folder grows: documents then move from
validation to training, never the other way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from clex_train.utils import log
from data_prep.config import CorpusConfig, CorpusSource
from data_prep.corpus.documents import MAX_WARNINGS, ContentOf, documents, text_content
from data_prep.corpus.sources import Unit

logger = log.get(__name__)

MOST = 4
"""Documents that a small corpus holds out at most."""
LEAST = 2
"""Documents that a bootstrap needs at least."""
SMALL_BYTES = 256_000_000
"""Size on disk up to which a corpus is read one extra time to apply the rule; beyond, the share alone decides."""


@dataclass(frozen=True)
class HeldOut:
    """Split rule of a corpus."""

    below: float
    """Exclusive upper limit of the hash values of held-out documents."""
    raised_to: int | None = None
    """Distinct texts held out because the share would give fewer; None if the share decides."""


def few(num_texts: int) -> int:
    """Return the number of texts to hold out: a tenth, between 2 and 4, and never more than half."""
    return min(max(LEAST, min(MOST, num_texts // 10)), num_texts // 2)


def rule(
    corpus: CorpusConfig, units: list[Unit], keep: Sequence[str] = (), content_of: ContentOf = text_content
) -> HeldOut:
    """Choose the split rule, which depends only on the content of the corpus; `keep`, `content_of` as in `documents`.

    Raises:
        InputError: as in `documents`.
    """
    share = HeldOut(corpus.validation_share * 2.0**64)
    is_small = sum(piece.num_bytes for unit in units for piece in unit.pieces) <= SMALL_BYTES
    if corpus.source is CorpusSource.hub or not is_small or corpus.split_field or not 0 < corpus.validation_share < 1:
        return share
    values: set[int] = set()
    num_held_out = 0
    # Records are read again when the documents are written, and warnings belong there.
    quiet = Counter({"bad_records": MAX_WARNINGS})
    for piece in (piece for unit in units for piece in unit.pieces):
        for document in documents(piece, corpus, quiet, keep, content_of=content_of):
            if document.text_hash not in values:
                # Distinct texts only: duplicates share a value and would raise the count without adding information.
                values.add(document.text_hash)
                num_held_out += document.text_hash < share.below
            # Usually reached early: a corpus with enough held-out documents is not read to its end.
            if num_held_out == MOST:
                return share
    wanted = few(len(values))
    if num_held_out >= wanted:
        return share
    return HeldOut(nsmallest(wanted, values)[-1] + 1, wanted)
