"""Which held-out tokens are scored: windows of the largest length inside single documents, the same at every length.

A window of `longest` tokens (W of them) is read as longest/N pieces of N tokens when the length N is evaluated. A
piece's first token has no context, so tokens whose index in the window is a multiple of the score stride (a divisor
of every length) are scored at no length: perplexities at two lengths are then averages over the very same tokens and
differ by context alone.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

from clex_train import distributed, log
from clex_train.data.store import TokenStore
from clex_train.seeding import generator
from clex_train.settings.evaluation import Protocol

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
    score_stride: int
    """Tokens at multiples of this index in the window are not scored."""

    @property
    def longest(self) -> int:
        """Length of every window in tokens."""
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> np.ndarray:
        """bool [longest]: the tokens of a window that count."""
        return np.arange(self.longest) % self.score_stride != 0

    def pieces(self, length: int) -> np.ndarray:
        """int64 [W * longest/length, length]: the windows cut up, those of the first window first."""
        assert self.longest % length == 0, "the length divides the window"
        assert length % self.score_stride == 0, "a piece's first token is never scored"
        return self.tokens.reshape(-1, length)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two evaluations share exactly if they scored the same tokens."""
        content = np.ascontiguousarray(self.tokens, dtype="<i8").tobytes()
        return hashlib.blake2b(
            f"{self.tokens.shape}/{self.score_stride}/".encode() + content, digest_size=8
        ).hexdigest()


def score_stride(lengths: Sequence[int], context_len: int, protocols: Collection[Protocol]) -> int:
    """Stride of the unscored tokens: the shortest length, or its common divisor with L where `chunked` cuts at L too.

    Raises `ValueError` if a common divisor of 1 leaves no token to score.
    """
    shortest = min(lengths)
    stride = math.gcd(shortest, context_len) if Protocol.chunked in protocols else shortest
    if stride < 2:
        raise ValueError(
            f"evaluation.lengths={list(lengths)}: {shortest} and the context length {context_len} have no common "
            "divisor, so `chunked` would leave no token scored; choose multiples of the context length"
        )
    return stride


def select(store: TokenStore, longest: int, num_windows: int, stride: int, seed: int = 0) -> WindowSet:
    """Choose at most `num_windows` non-overlapping windows of `longest` tokens as a function of the seed alone.

    Every document that is long enough gives one window before any gives a second, and a larger `num_windows` keeps the
    windows of a smaller one. Raises `ValueError` if no document has `longest` tokens.
    """
    document_lens = np.diff(store.doc_offsets)
    capacity = document_lens // longest
    if not capacity.any():
        raise ValueError(
            f"evaluation.lengths={longest}: none of the {len(document_lens)} validation documents is that long "
            f"(the longest has {int(document_lens.max(initial=0))} tokens); "
            "evaluate shorter lengths or name another store"
        )
    chosen = sorted(islice(_candidates(capacity, seed), num_windows))
    if len(chosen) < num_windows and distributed.is_main():
        logger.warning(
            "evaluation.num_windows=%d: the validation split holds %d windows of %d tokens, all are used",
            num_windows,
            len(chosen),
            longest,
        )
    documents, indices = np.array(chosen, dtype=np.int64).T
    starts = indices * longest
    offsets = store.doc_offsets[documents] + starts
    tokens = np.stack([store.tokens(int(start), int(start) + longest) for start in offsets]).astype(np.int64)
    return WindowSet(tokens, documents, starts, stride)


def _candidates(capacity: np.ndarray, seed: int) -> Iterator[tuple[int, int]]:
    """(document, window in it), round by round: each takes one more window of every document that has one."""
    for round_ in count():
        documents = np.flatnonzero(capacity > round_)
        if not len(documents):
            return
        for document in generator(seed, "evaluation_documents", round_).permutation(documents):
            order = generator(seed, "evaluation_windows", int(document)).permutation(capacity[document])
            yield int(document), int(order[round_])
