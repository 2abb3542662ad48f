"""Selection of held-out text: windows of the largest length, each inside one document.

The same windows serve every length; `protocols` chooses the spans and scored tokens within a window.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

from clex_train.token_store.store import TokenStore
from clex_train.utils import distributed, log
from clex_train.utils.errors import ConfigError
from clex_train.utils.seeding import generator

logger = log.get(__name__)


@dataclass(frozen=True)
class WindowSet:
    """W windows of equal length, each inside one document."""

    tokens: np.ndarray
    """int64 [W, longest]: the token ids."""
    documents: np.ndarray
    """int64 [W]: index of the window's document in the split; documents are the units of the bootstrap."""
    starts: np.ndarray
    """int64 [W]: offset of the window's first token in its document."""
    bos_id: int | None = None
    """Id of BOS, which replaces the first token of every span. That token is never scored, so the scored tokens are
    the same with BOS and without."""

    @property
    def longest(self) -> int:
        """Length of every window in tokens."""
        return int(self.tokens.shape[1])

    def fingerprint(self, scored: np.ndarray) -> str:
        """Hash the scored tokens to 16 hex digits, equal for equal tokens only.

        `scored` is bool [longest], or [W, longest] where windows differ.
        """
        # A regular mask is hashed by its stride, as in files of older versions, whose fingerprints must still match.
        gaps = np.flatnonzero(~scored[..., 1:]) + 1
        stride = int(gaps[0]) if len(gaps) else self.longest
        regular = scored.ndim == 1 and np.array_equal(scored, np.arange(self.longest) % stride != 0)
        place = str(stride) if regular else np.packbits(scored).tobytes().hex()
        return _digest(f"{self.tokens.shape}/{place}/{self._begin}", self.tokens)

    @cached_property
    def content(self) -> str:
        """Hash of the windows' tokens, 16 hex digits."""
        return _digest(f"windows/{self.tokens.shape}/{self._begin}", self.tokens)

    def span(self, window: int, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of a window, int64, with BOS in place of the first if it is set."""
        # A copy, since BOS overwrites a token that other spans score.
        tokens = self.tokens[window, start:stop].copy()
        if self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens

    @property
    def _begin(self) -> str:
        return "" if self.bos_id is None else f"bos {self.bos_id}/"


def select(store: TokenStore, longest: int, num_windows: int, seed: int = 0, bos_id: int | None = None) -> WindowSet:
    """Choose up to `num_windows` non-overlapping windows of `longest` tokens, as a function of the seed alone.

    A larger `num_windows` keeps the windows of a smaller one. `bos_id` replaces the first token of every span. Raises
    `ConfigError` when no document has `longest` tokens.
    """
    if store.manifest.is_masked and distributed.is_main():
        logger.warning("%s holds conversations: perplexity counts all of their tokens, those of users too", store.path)
    require_windows(store, longest)
    # Aligned windows: offsets at multiples of `longest` cannot overlap.
    capacity = np.diff(store.doc_offsets) // longest
    chosen = sorted(islice(_candidates(capacity, seed), num_windows))
    if len(chosen) < num_windows and distributed.is_main():
        logger.warning(
            "evaluation.num_windows=%d: the validation split has only %d windows of %d tokens, all are used "
            "(%d of %d documents are shorter)",
            num_windows,
            len(chosen),
            longest,
            int((capacity == 0).sum()),
            len(capacity),
        )
    documents, indices = np.array(chosen, dtype=np.int64).T
    starts = indices * longest
    offsets = store.doc_offsets[documents] + starts
    tokens = np.stack([store.tokens(int(start), int(start) + longest) for start in offsets]).astype(np.int64)
    return WindowSet(tokens, documents, starts, bos_id)


def require_windows(store: TokenStore, longest: int) -> None:
    """Raise `ConfigError` when no document has `longest` tokens."""
    document_lens = np.diff(store.doc_offsets)
    most = int(document_lens.max(initial=0))
    if most < longest:
        raise ConfigError(
            "evaluation.lengths",
            longest,
            f"none of the {len(document_lens)} validation documents is that long "
            f"(the longest has {most} tokens); evaluate shorter lengths or name another store",
        )


def _candidates(capacity: np.ndarray, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (document, window in it) in rounds, one window of every document in each round."""
    # Many documents with few windows each give smaller standard errors than few documents with many.
    for round_ in count():
        documents = np.flatnonzero(capacity > round_)
        if not len(documents):
            return
        for document in generator(seed, "evaluation_documents", round_).permutation(documents):
            order = generator(seed, "evaluation_windows", int(document)).permutation(capacity[document])
            yield int(document), int(order[round_])


def _digest(head: str, tokens: np.ndarray) -> str:
    content = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    return hashlib.blake2b(head.encode() + content, digest_size=8).hexdigest()
