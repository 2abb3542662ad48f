"""How much of each evaluation document is in each training document.

For a pair of documents with sets A (evaluation) and T (training) of distinct word n-grams:

    similarity  = mean over n of |A & T| / |A | T|     (Jaccard)
    containment = mean over n of |A & T| / |A|

A pair offends if its similarity is at least `threshold`, its containment at least `containment`, or MinHash (Broder,
1997) estimates a Jaccard of its n-grams of `shingle` words of at least `minhash_threshold`. The first two are computed
for every pair and are exact; the third is looked up in an LSH table, which can miss a pair close to its limit.
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


@dataclass(frozen=True)
class Pair:
    """An evaluation and a training document; the lists have a value for each n."""

    evaluation_doc: int
    train_doc: int
    similarity: float
    jaccard: list[float]
    containment: float
    contained: list[float]
    minhash: float | None
    rules: list[str]
    """The limits that are reached; none in a pair that is shown for orientation."""


@dataclass
class Findings:
    """What comparing a range of training documents gave."""

    offending: list[Pair] = field(default_factory=list)
    """In the order of training documents."""
    nearest: dict[int, Pair] = field(default_factory=dict)
    """For each evaluation document its most similar pair below all limits; none where nothing is shared."""
    wordless: int = 0
    """Training documents without a word, of which nothing can be said."""

    def add(self, later: Findings) -> None:
        """Append findings about later training documents."""
        self.offending += later.offending
        self.wordless += later.wordless
        for doc, pair in later.nearest.items():
            if doc not in self.nearest or pair.similarity > self.nearest[doc].similarity:
                self.nearest[doc] = pair


class Sketches:
    """MinHash signatures of evaluation documents in an LSH table.

    Args:
        signatures: [E, permutations], from `signature`; a row of a document without words is never found.
        threshold: estimated Jaccard from which a pair is found, in (0, 1].
    """

    def __init__(self, signatures: np.ndarray, has_words: np.ndarray, threshold: float) -> None:
        self.signatures = signatures
        self._threshold = threshold
        self._lsh = MinHashLSH(threshold=threshold, num_perm=signatures.shape[1])
        for doc in np.flatnonzero(has_words):
            self._lsh.insert(int(doc), _sketch(signatures.shape[1], signatures[doc]))

    def estimate(self, doc: int, signature: np.ndarray) -> float:
        """The estimated Jaccard with evaluation document `doc`."""
        return float((self.signatures[doc] == signature).mean())

    def near(self, signature: np.ndarray) -> list[int]:
        """The evaluation documents that the table finds and whose estimate reaches the threshold."""
        candidates = sorted(self._lsh.query(_sketch(len(signature), signature)))
        return [doc for doc in candidates if self.estimate(doc, signature) >= self._threshold]


def signature(words: np.ndarray, shingle: int, permutations: int) -> np.ndarray:
    """[permutations]: the MinHash signature of a document's n-grams of `shingle` words, from their upper 32 bits."""
    sketch = _sketch(permutations)
    for grams in distinct_ngrams(words, shingle):
        hashes = (grams >> np.uint64(32)).tolist()
        for start in range(0, len(hashes), _SKETCH_BATCH):
            sketch.update_batch(hashes[start : start + _SKETCH_BATCH])
    return np.asarray(sketch.hashvalues)


def compare(
    index: NgramIndex, sketches: Sketches | None, documents: Sequence[tuple[int, np.ndarray]], config: DecontaminateVerb
) -> Findings:
    """Compare training documents, (doc_id, word hashes) each, with all of the index.

    `evaluation_doc` of the pairs is the number in the index.
    """
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
    """Group documents, so that small ones share the cost of a look-up and memory is bounded."""
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
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def _sketch(permutations: int, values: np.ndarray | None = None) -> MinHash:
    # The items are hashes already; affine32 is datasketch's fastest family for 32 bits.
    return MinHash(permutations, scheme="affine32", hashfunc=int, hashvalues=values)
