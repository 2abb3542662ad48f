"""Word n-grams of documents as sets of 64-bit hashes, and an index over those of many documents.

A word is a run of letters, digits and underscores of the casefolded text, or a single character of a script without
spaces between words (Chinese, Japanese). An n-gram is n consecutive words; a shorter document has one n-gram, all of
it. Sets are exact up to collisions of 64-bit hashes, of which 10^9 n-grams have an expected 0.03.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError

PIECE_TOKENS = 1 << 16
"""Tokens to decode at a time."""
PART_WORDS = 1 << 22
"""Words, or n-grams, to hash at a time."""
_LOOK_BACK = 1 << 12
_CACHED_WORDS = 500_000
_FLAT = 1 << 22
"""Pairs of (n-gram, indexed document) to count at a time."""
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class WordReader:
    """Reads the words of a split's documents as hashes, decoded by the store's own tokenizer.

    Long documents are decoded in pieces, cut before a token that begins with white space, so that no word is cut
    unless 4,096 tokens in a row have none. `num_bytes` counts the UTF-8 bytes decoded so far.

    Raises:
        ConfigError: the store has no tokenizer.json.
    """

    def __init__(self, store: TokenStore) -> None:
        file = store.tokenizer_path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(file, None, "missing, so the tokens cannot be decoded to words; tokenize again")
        self.store = store
        self.num_bytes = 0
        self._offsets = store.doc_offsets
        self._tokenizer = Tokenizer.from_file(str(file))
        self._hashes = _WordHashes()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._begins_with_space = np.zeros(max(vocabulary.values(), default=0) + 1, bool)
        # Spellings of white space: Ġ Ċ ĉ in byte-level vocabularies, ▁ in SentencePiece, or a plain space.
        spaced = [token_id for token, token_id in vocabulary.items() if token.startswith(("Ġ", "Ċ", "ĉ", "▁", " "))]
        self._begins_with_space[spaced] = True

    def words(self, doc_id: int) -> np.ndarray:
        """Return uint64 [W]: a hash of each word of a document, in order. Other memory does not grow with W."""
        start, stop = (int(offset) for offset in self._offsets[doc_id : doc_id + 2])
        # Without BOS and EOS, which would decode to words.
        parts = [
            self._words(self._decode(first, last)) for first, last in self._pieces(start + self.store.bos, stop - 1)
        ]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while stop - start > PIECE_TOKENS:
            first = start + PIECE_TOKENS - _LOOK_BACK
            borders = np.flatnonzero(self._begins_with_space[self.store.tokens(first, start + PIECE_TOKENS)])
            cut = first + int(borders[-1]) if len(borders) else start + PIECE_TOKENS
            yield start, cut
            start = cut
        yield start, stop

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self.store.tokens(start, stop).tolist(), skip_special_tokens=False))

    def _words(self, text: str) -> np.ndarray:
        self.num_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        found = split_words(text)
        # Clearing is simpler than LRU, and frequent words return within one document.
        if len(self._hashes) > _CACHED_WORDS:
            self._hashes.clear()
        return np.fromiter(map(self._hashes.__getitem__, found), np.uint64, len(found))


class _WordHashes(dict[str, int]):
    """Cache of the 8-byte blake2b hash of each word."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


def split_words(text: str) -> list[str]:
    """Split a text into words, as defined by the module."""
    return _WORD.findall(text.casefold())


def distinct_ngrams(words: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Yield the set of a document's n-grams as sorted, disjoint uint64 arrays in ascending order.

    Args:
        words: uint64 [W], hashes of the words.
        n: words of an n-gram, at least 1.
    """
    if not len(words):
        return
    n = min(n, len(words))
    # A document of more than 4 million words is processed in parts of the hash range, which bounds memory.
    num_parts = -(-len(words) // PART_WORDS)
    for part in range(num_parts):
        hashes = [
            chunk if num_parts == 1 else chunk[(chunk >> _HALF) * np.uint64(num_parts) >> _HALF == part]
            for chunk in _ngrams(words, n)
        ]
        yield sorted_set(np.concatenate(hashes))


def sorted_set(values: np.ndarray) -> np.ndarray:
    """Return the distinct values, ascending."""
    # np.unique is some 50 times slower on uint64 in numpy 2.4, where it hashes the values first.
    ordered = np.sort(values)
    first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def _ngrams(words: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Yield hashes of the n-grams, in order."""
    count = len(words) - n + 1
    for start in range(0, count, PART_WORDS):
        stop = min(start + PART_WORDS, count)
        hashes = words[start:stop]
        for k in range(1, n):
            # Mix before adding the next word, so that the order of words within an n-gram counts.
            hashes = hashes * _FACTOR
            hashes ^= hashes >> _HALF
            hashes += words[start + k : stop + k]
        yield hashes


@dataclass(frozen=True)
class NgramIndex:
    """Inverted index from n-grams to E documents, for each of N sizes n.

    `keys[k]`: uint64 [K], the n-grams of all documents, ascending; key i occurs in documents
    `owners[k][starts[k][i]:starts[k][i + 1]]`.
    """

    ngrams: tuple[int, ...]
    keys: list[np.ndarray]
    starts: list[np.ndarray]
    owners: list[np.ndarray]
    sizes: np.ndarray
    """int64 [E, N]: distinct n-grams of each document."""

    @property
    def num_documents(self) -> int:
        """E, the number of indexed documents."""
        return len(self.sizes)

    def intersections(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Count the distinct n-grams of other documents, and those that each indexed document shares with them.

        Args:
            documents: B arrays of word hashes.

        Returns:
            sizes int64 [B, N] and shared int64 [B, E, N].
        """
        sizes = np.zeros((len(documents), len(self.ngrams)), np.int64)
        shared = np.zeros((len(documents), self.num_documents, len(self.ngrams)), np.int64)
        for k, n in enumerate(self.ngrams):
            parts: list[tuple[int, np.ndarray]] = []
            waiting = 0
            for b, words in enumerate(documents):
                for part in distinct_ngrams(words, n):
                    sizes[b, k] += len(part)
                    parts.append((b, part))
                    waiting += len(part)
                    if waiting >= PART_WORDS:
                        shared[:, :, k] += self._count(k, parts, len(documents))
                        parts, waiting = [], 0
            shared[:, :, k] += self._count(k, parts, len(documents))
        return sizes, shared

    def _count(self, k: int, parts: list[tuple[int, np.ndarray]], num_documents: int) -> np.ndarray:
        """Count in int64 [B, E] the n-grams of the parts that each indexed document has."""
        total = np.zeros(num_documents * self.num_documents, np.int64)
        if not parts or not len(self.keys[k]):
            return total.reshape(num_documents, self.num_documents)
        # Look up all documents of the batch together: one searchsorted is far faster than one per document.
        hashes = np.concatenate([part for _, part in parts])
        numbers = np.repeat([b for b, _ in parts], [len(part) for _, part in parts])
        places = np.minimum(np.searchsorted(self.keys[k], hashes), len(self.keys[k]) - 1)
        found = np.flatnonzero(self.keys[k][places] == hashes)
        places, numbers = places[found], numbers[found]
        counts = self.starts[k][places + 1] - self.starts[k][places]
        # Common n-grams belong to many documents; processing some at a time bounds the memory.
        for some in np.split(np.arange(len(places)), _borders(np.cumsum(counts), _FLAT)):
            owners = self.owners[k][_ranges(self.starts[k][places[some]], counts[some])]
            pairs = np.repeat(numbers[some] * self.num_documents, counts[some]) + owners
            total += np.bincount(pairs, minlength=len(total))
        return total.reshape(num_documents, self.num_documents)

    def save(self, folder: Path) -> None:
        """Write the arrays, so that several processes can map the same memory."""
        np.save(folder / "ngrams.npy", np.array(self.ngrams))
        np.save(folder / "sizes.npy", self.sizes)
        for k in range(len(self.ngrams)):
            for name in ("keys", "starts", "owners"):
                np.save(folder / f"{name}_{k}.npy", getattr(self, name)[k])

    @classmethod
    def load(cls, folder: Path) -> NgramIndex:
        """Map the arrays that `save` wrote."""
        ngrams = tuple(np.load(folder / "ngrams.npy").tolist())
        keys, starts, owners = (
            [np.load(folder / f"{name}_{k}.npy", mmap_mode="r") for k in range(len(ngrams))]
            for name in ("keys", "starts", "owners")
        )
        return cls(ngrams, keys, starts, owners, np.load(folder / "sizes.npy"))


def build_index(documents: Sequence[np.ndarray], ngrams: Sequence[int]) -> NgramIndex:
    """Build the index over documents, given as arrays of word hashes, for the sizes `ngrams`.

    Peak memory: 20 bytes per n-gram of each size, and 32 more per n-gram of one size.
    """
    keys, starts, owners = [], [], []
    sizes = np.zeros((len(documents), len(ngrams)), np.int64)
    for k, n in enumerate(ngrams):
        sets = [np.concatenate([np.empty(0, np.uint64), *distinct_ngrams(words, n)]) for words in documents]
        sizes[:, k] = [len(grams) for grams in sets]
        owner = np.repeat(np.arange(len(sets), dtype=np.int32), sizes[:, k])
        hashes = np.concatenate([np.empty(0, np.uint64), *sets])
        # Free one copy before sorting makes another.
        del sets
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        first = np.flatnonzero(np.concatenate([np.ones(min(1, len(hashes)), bool), hashes[1:] != hashes[:-1]]))
        keys.append(hashes[first])
        starts.append(np.append(first, len(hashes)))
        owners.append(owner[order])
    return NgramIndex(tuple(ngrams), keys, starts, owners, sizes)


def _borders(cumulative: np.ndarray, most: int) -> np.ndarray:
    """Return the indices at which to split so that each part sums to about `most`, given the running sum."""
    return np.flatnonzero(np.diff(cumulative // most)) + 1


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate several index ranges."""
    before = np.cumsum(counts) - counts
    indices: np.ndarray = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return indices
