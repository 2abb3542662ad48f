"""Config of the verb `retrieval_text`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most
from data_prep.config import MOST_MB, CorpusConfig, require_line_file

MOST_CHARS = 10**8
MOST_DISTRACTORS = 500
"""Below the number of distinct things that statements are about."""
STATEMENT_CHARS = 48
"""Longest statement of a `repeat` document with the space after it, in characters."""


class RetrievalKind(Enum):
    """Kinds of documents; `draft.py` shows them."""

    passkey = "passkey"
    repeat = "repeat"
    quote = "quote"


@dataclass
class RowTokenizer:
    """Tokenizer that `max_tokens` counts with."""

    path: str | None = None
    """Directory or hub name of a fast Hugging Face tokenizer; short form: `tokenizer=PATH`."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the tokenizer to run. Use it only for repositories you have read."""


@dataclass
class RetrievalTextVerb:
    """Keys of the verb."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Corpus of the filler: a file of conf/corpus by `+corpus=NAME`, or single keys. Held-out documents are not used:
    set the `corpus.validation_share` and `corpus.split_field` of the store that is evaluated."""
    output: str = "corpora/${corpus.name}_retrieval.jsonl.zst"
    """File to write, one {"text", "meta"} object per line: .jsonl, .jsonl.gz or .jsonl.zst."""
    num_documents: int = 10_000
    """Documents to write. A larger number only adds documents."""
    min_chars: int = 240
    """Shortest document in characters, up to a word; lengths are uniform."""
    max_chars: int = 400
    """Longest document in characters."""
    tokenizer: RowTokenizer = field(default_factory=RowTokenizer)
    """Tokenizer of `max_tokens`."""
    max_tokens: int | None = None
    """Longest document in tokens, BOS and EOS included: `data.seq_len` of training; a longer one is drawn again."""
    kinds: list[RetrievalKind] = field(default_factory=lambda: list(RetrievalKind))
    """Kinds of documents, taken in turn; name one twice to double its share."""
    distractors: int = 1
    """Statements about other things in a document of kind `repeat`."""
    max_mb: int = 256
    """Megabytes of filler to keep in memory, taken from the beginning of the corpus."""
    seed: int = 0
    """Seed; document n is a function of (seed, n), the filler and the keys above."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        require_line_file(self.output)
        most = {"num_documents": 10**9, "max_chars": MOST_CHARS, "distractors": MOST_DISTRACTORS, "max_mb": MOST_MB}
        require_at_most(self, "", most | {"max_tokens": MOST_TOKENS})
        for key in ("num_documents", "max_mb"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.distractors >= 0, "distractors", self.distractors, "0 or more")
        require(len(self.kinds) > 0, "kinds", "[]", "name at least one kind: passkey, repeat, quote")
        # Every statement at the greatest length that it can have, and some filler.
        least = STATEMENT_CHARS * (self.distractors + 3)
        require(self.min_chars >= least, "min_chars", self.min_chars, f"at least {least}, to have room for statements")
        require(self.max_chars >= self.min_chars, "max_chars", self.max_chars, f"at least min_chars={self.min_chars}")
        # numpy seeds are nonnegative; 2**63 keeps the value an int64 in YAML and JSON.
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or a positive integer below 2**63")
        self._check_tokens()

    def _check_tokens(self) -> None:
        longest, path = self.max_tokens, self.tokenizer.path
        require(longest is None or longest >= 2, "max_tokens", longest, "at least 2 tokens")
        counted = longest is not None
        require(not counted or path is not None, "tokenizer.path", path, "name the tokenizer to count max_tokens with")
        require(counted or path is None, "tokenizer.path", path, "only for max_tokens; set that, or leave this out")
