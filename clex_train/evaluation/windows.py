"""Which held-out text is read: windows of the largest length inside single documents, the same at every length.

What of a window is read at a length, and which of its tokens count, is the protocol's (`protocols`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

from clex_train.data.store import TokenStore
from clex_train.utils import distributed, log
from clex_train.utils.errors import ConfigError
from clex_train.utils.seeding import generator

logger = log.get(__name__)


@dataclass(frozen=True)
class WindowSet:
    """W windows of equal length, each from within one document."""

    tokens: np.ndarray
    """int64 [W, longest]: the token ids."""
    documents: np.ndarray
    """int64 [W]: index of the window's document in the split; documents are the unit of a bootstrap."""
    starts: np.ndarray
    """int64 [W]: offset of the window's first token in its document."""
    bos_id: int | None = None
    """BOS, which stands in place of the first token of whatever is read at once. That token is never scored, so the
    same tokens are, with BOS and without."""

    @property
    def longest(self) -> int:
        """Length of every window in tokens."""
        return int(self.tokens.shape[1])

    def fingerprint(self, scored: np.ndarray) -> str:
        """16 hex digits that two evaluations share exactly if they scored the same tokens; `scored` is bool [longest].

        Where all but the multiples of a stride are scored, the stride says so: the form that older files have.
        """
        gaps = np.flatnonzero(~scored[1:]) + 1
        stride = int(gaps[0]) if len(gaps) else self.longest
        regular = np.array_equal(scored, np.arange(self.longest) % stride != 0)
        place = str(stride) if regular else np.packbits(scored).tobytes().hex()
        return _digest(f"{self.tokens.shape}/{place}/{self._begin}", self.tokens)

    @cached_property
    def content(self) -> str:
        """16 hex digits that two sets share exactly if they hold the same windows of tokens."""
        return _digest(f"windows/{self.tokens.shape}/{self._begin}", self.tokens)

    def span(self, window: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: what a model reads of a window, begun with BOS where there is one."""
        tokens = self.tokens[window, start:stop].copy()
        if self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens

    @property
    def _begin(self) -> str:
        return "" if self.bos_id is None else f"bos {self.bos_id}/"


def select(store: TokenStore, longest: int, num_windows: int, seed: int = 0, bos_id: int | None = None) -> WindowSet:
    """Choose at most `num_windows` non-overlapping windows of `longest` tokens as a function of the seed alone.

    Every document that is long enough gives one window before any gives a second, and a larger `num_windows` keeps the
    windows of a smaller one. `bos_id` begins whatever is read at once. Raises `ValueError` if no
    document has `longest` tokens.
    """
    require_windows(store, longest)
    capacity = np.diff(store.doc_offsets) // longest
    chosen = sorted(islice(_candidates(capacity, seed), num_windows))
    if len(chosen) < num_windows and distributed.is_main():
        logger.warning(
            "evaluation.num_windows=%d: the validation split holds %d windows of %d tokens, all are used "
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
    """`ValueError` if no document has `longest` tokens."""
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
    """(document, window in it), round by round: each takes one more window of every document that has one."""
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
