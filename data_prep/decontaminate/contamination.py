"""Measure the overlap of each evaluation document with each training document.

For a pair of documents with sets A (evaluation) and T (training) of distinct word n-grams:

    similarity  = mean over n of |A & T| / |A | T|     (Jaccard)
    containment = mean over n of |A & T| / |A|

A pair is contaminated if its similarity reaches `threshold`, its containment reaches `containment`, or MinHash (Broder,
1997) estimates that the Jaccard index of its `shingle`-word n-grams reaches `minhash_threshold`. The first two are
exact and computed for every pair; the third uses an LSH table, which can miss a pair near its limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH

from data_prep.config import DecontaminateVerb
from data_prep.decontaminate.ngrams import NgramIndex, distinct_ngrams

SIMILARITY, CONTAINMENT, MINHASH = "similarity", "containment", "minhash"
_SKETCH_BATCH = 4096
"""Hashes per MinHash update: the update allocates [batch, permutations]."""


@dataclass(frozen=True)
class Pair:
    """An evaluation document and a training document; the lists have one value for each n-gram size."""

    evaluation_doc: int
    train_doc: int
    similarity: float
    jaccard: list[float]
    containment: float
    contained: list[float]
    minhash: float | None
    rules: list[str]
    """Limits that the pair reaches; empty for a pair that is only listed as the nearest."""


@dataclass
class Findings:
    """Result of comparing a range of training documents."""

    offending: list[Pair] = field(default_factory=list)
    """Contaminated pairs, in the order of training documents."""
    nearest: dict[int, Pair] = field(default_factory=dict)
    """Most similar pair below all limits, by evaluation document; absent if nothing is shared."""
    wordless: int = 0
    """Training documents without any word, which cannot be compared."""

    def add(self, later: Findings) -> None:
        """Append the findings of later training documents."""
        self.offending += later.offending
        self.wordless += later.wordless
        for doc, pair in later.nearest.items():
            # Strictly greater: on a tie the earlier training document stays, with any number of workers.
            if doc not in self.nearest or pair.similarity > self.nearest[doc].similarity:
                self.nearest[doc] = pair


class Sketches:
    """MinHash signatures of evaluation documents in an LSH table.

    Args:
        signatures: [E, permutations], from `signature`.
        has_words: bool [E]; documents without words are left out of the table.
        threshold: estimated Jaccard index from which a pair is found, in (0, 1].
    """

    def __init__(self, signatures: np.ndarray, has_words: np.ndarray, threshold: float) -> None:
        self.signatures = signatures
        self._threshold = threshold
        self._lsh = MinHashLSH(threshold=threshold, num_perm=signatures.shape[1])
        # All documents without words share one signature and would match each other.
        for doc in np.flatnonzero(has_words):
            self._lsh.insert(int(doc), _sketch(signatures.shape[1], signatures[doc]))

    def estimate(self, doc: int, signature: np.ndarray) -> float:
        """Estimate the Jaccard index with evaluation document `doc`."""
        return float((self.signatures[doc] == signature).mean())

    def near(self, signature: np.ndarray) -> list[int]:
        """Find the evaluation documents whose estimate reaches the threshold."""
        candidates = sorted(self._lsh.query(_sketch(len(signature), signature)))
        return [doc for doc in candidates if self.estimate(doc, signature) >= self._threshold]


def signature(words: np.ndarray, shingle: int, permutations: int) -> np.ndarray:
    """Compute the MinHash signature [permutations] of a document's `shingle`-word n-grams."""
    sketch = _sketch(permutations)
    for grams in distinct_ngrams(words, shingle):
        # The upper 32 bits: the scheme affine32 takes 32-bit items, and multiplication mixes upper bits best.
        hashes = (grams >> np.uint64(32)).tolist()
        for start in range(0, len(hashes), _SKETCH_BATCH):
            sketch.update_batch(hashes[start : start + _SKETCH_BATCH])
    return np.asarray(sketch.hashvalues)


def compare(
    index: NgramIndex, sketches: Sketches | None, documents: Sequence[tuple[int, np.ndarray]], config: DecontaminateVerb
) -> Findings:
    """Compare training documents, given as (doc_id, word hashes), with the whole index.

    `evaluation_doc` in the pairs is the document's number in the index.
    """
    # Exact set sizes: estimates such as HyperLogLog are too coarse for thresholds near 0.1.
    sizes, shared = index.intersections([words for _, words in documents])
    findings = Findings(wordless=sum(len(words) == 0 for _, words in documents))
    best = np.zeros(index.num_documents)
    for b, (train_doc, words) in enumerate(documents):
        jaccard = _share(shared[b], sizes[b] + index.sizes - shared[b])
        contained = _share(shared[b], index.sizes)
        sketch = signature(words, config.shingle, config.permutations) if sketches is not None and len(words) else None
        near = sketches.near(sketch) if sketches is not None and sketch is not None else []
        similarity = jaccard.mean(axis=1)
        reached = {
            SIMILARITY: similarity >= config.threshold,
            CONTAINMENT: contained.mean(axis=1) >= config.containment,
            MINHASH: np.isin(np.arange(index.num_documents), near),
        }
        offends = np.any(list(reached.values()), axis=0)
        for doc in map(int, np.flatnonzero(offends)):
            rules = [name for name, docs in reached.items() if docs[doc]]
            estimate = sketches.estimate(doc, sketch) if sketches is not None and sketch is not None else None
            findings.offending.append(_pair(doc, train_doc, jaccard[doc], contained[doc], estimate, rules))
        # Keep one nearest pair per evaluation document: storing all pairs would grow with the training data.
        nearer = ~offends & (similarity > best)
        best[nearer] = similarity[nearer]
        for doc in map(int, np.flatnonzero(nearer)):
            findings.nearest[doc] = _pair(doc, train_doc, jaccard[doc], contained[doc], None, [])
    return findings


def _pair(
    doc: int, train_doc: int, jaccard: np.ndarray, contained: np.ndarray, minhash: float | None, rules: list[str]
) -> Pair:
    return Pair(
        doc,
        train_doc,
        float(jaccard.mean()),
        jaccard.tolist(),
        float(contained.mean()),
        contained.tolist(),
        minhash,
        rules,
    )


def in_batches(
    documents: Iterable[tuple[int, np.ndarray]], most_words: int, most_documents: int
) -> Iterable[list[tuple[int, np.ndarray]]]:
    """Group documents, so that small ones share the cost of a lookup while memory stays bounded."""
    batch: list[tuple[int, np.ndarray]] = []
    num_words = 0
    for doc_id, words in documents:
        batch.append((doc_id, words))
        num_words += len(words)
        if num_words >= most_words or len(batch) >= most_documents:
            yield batch
            batch, num_words = [], 0
    if batch:
        yield batch


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide elementwise; 0 where the denominator is 0."""
    shares: np.ndarray = np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
    return shares


def _sketch(permutations: int, values: np.ndarray | None = None) -> MinHash:
    # The items are hashes already, hence `hashfunc=int`; affine32 is datasketch's fastest family for 32 bits.
    return MinHash(permutations, scheme="affine32", hashfunc=int, hashvalues=values)
