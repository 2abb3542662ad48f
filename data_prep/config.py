"""The configuration of the data programs: one dataclass per verb of `python -m data_prep`, documented by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.config.bos import Bos
from clex_train.config.data import Packing
from clex_train.utils.bounds import MOST_TOKENS, require, require_at_most
from clex_train.utils.files import require_plain_name

MOST_WORKERS = 1024
MOST_MB = 2**20
"""A terabyte."""


class CorpusSource(Enum):
    files = "files"
    hub = "hub"
    stdlib = "stdlib"


class Format(Enum):
    auto = "auto"
    jsonl = "jsonl"
    txt = "txt"
    parquet = "parquet"


class OnBadRecord(Enum):
    error = "error"
    skip = "skip"


class EngineChoice(Enum):
    auto = "auto"
    gigatoken = "gigatoken"
    tokenizers = "tokenizers"


@dataclass
class CorpusConfig:
    name: str = "corpus"
    """Name of the corpus; outputs go to corpora/NAME unless said otherwise."""
    source: CorpusSource = CorpusSource.files
    """`files`: what `paths` names; `hub`: a data set in the hub's layout; `stdlib`: this Python's standard library."""
    paths: list[str] = field(default_factory=list)
    """Files, directories (read recursively) and globs; .gz, .zst, .xz and .bz2 are decompressed while reading."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, or a local directory in its layout; streamed."""
    hub_subset: str | None = None
    """Configuration ("subset") of the hub data set."""
    hub_split: str = "train"
    """Split of the hub data set. Its documents are split again by `validation_share`."""
    hub_revision: str | None = None
    """Commit, tag or branch of the hub data set; pin it for stores that must be repeatable."""
    format: Format = Format.auto
    """`auto` goes by the file's name: .jsonl .jsonlines .json .ndjson .txt .text .md, also compressed; .parquet."""
    text_field: str = "text"
    """Field of a record that holds the document; a dot descends into a nested record."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only records whose fields equal these values, as +corpus.where={meta.redpajama_set_name: RedPajamaBook}."""
    validation_share: float = 0.01
    """Share of the documents held out, a few at least of a small corpus; the hash of a document's text decides, so that
    added documents move no other."""
    split_field: str | None = None
    """Decide the split by this field instead of the text, to keep documents of one origin on one side."""
    on_bad_record: OnBadRecord = OnBadRecord.error
    """A record that cannot be used stops the program (`error`), or is left out, logged and counted (`skip`)."""

    def __post_init__(self) -> None:
        require_plain_name("corpus.name", self.name, "it names the outputs by default")
        require(
            0 <= self.validation_share <= 1, "corpus.validation_share", self.validation_share, "a share between 0 and 1"
        )
        require(self.text_field != "", "corpus.text_field", "''", "name the field that holds the document")


@dataclass
class CorpusVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What to read: a file of conf/corpus by `+corpus=NAME`, or single keys."""
    output: str = "corpora/${corpus.name}.jsonl.zst"
    """File to write, one {"text", "meta"} a line: .jsonl, .jsonl.gz or .jsonl.zst."""
    overwrite: bool = False
    """Replace an output that exists."""

    def __post_init__(self) -> None:
        require(
            self.output.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")),
            "output",
            self.output,
            "must end in .jsonl, .jsonl.gz or .jsonl.zst",
        )


@dataclass
class TokenizerConfig:
    path: str = "corpora/${corpus.name}_tokenizer"
    """Directory or hub name of a fast Hugging Face tokenizer with an EOS token; `tokenizer=PATH` says the same."""
    engine: EngineChoice = EngineChoice.auto
    """What encodes; the ids are the same. `auto`: gigatoken where it can, else tokenizers; a name: that or an error."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the tokenizer to run. Only for repositories you have read."""


@dataclass
class TokenizeVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What to read: a file of conf/corpus by `+corpus=NAME`, or single keys."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and what runs it."""
    bos: Bos = Bos.auto
    """BOS at the beginning of every document. `auto`: as the tokenizer does with a text of its own accord."""
    output: str = "corpora/${corpus.name}"
    """Directory of the token store to write."""
    workers: int = 1
    """Processes, each of which tokenises whole shards; the store does not depend on it. One worker uses threads."""
    shard_mb: int = 256
    """Megabytes of source per shard: large .jsonl files are cut at line ends, small files share a shard."""
    overwrite: bool = False
    """Replace a store, or the half-written one, that exists and was asked for with other settings."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"workers": MOST_WORKERS, "shard_mb": MOST_MB})
        require(self.workers >= 1, "workers", self.workers, "at least 1 process")
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "at least 1 megabyte")


@dataclass
class TrainTokenizerVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What to read: a file of conf/corpus by `+corpus=NAME`, or single keys. Held-out documents are not read."""
    output: str = "corpora/${corpus.name}_tokenizer"
    """Directory to write, in the Hugging Face layout."""
    vocab_size: int = 2048
    """Tokens of the vocabulary: 256 bytes, 3 special tokens, the rest merges."""
    model_max_length: int | None = None
    """Length in tokens beyond which Hugging Face's tokenizer warns; by default none."""
    pad_token: str = "<pad>"
    """Padding, id 0."""
    bos_token: str = "<s>"
    """Beginning of a sequence, id 1."""
    eos_token: str = "</s>"
    """End of a document, id 2."""
    max_mb: int = 1024
    """Megabytes of text to learn from; the first documents are taken."""
    overwrite: bool = False
    """Replace an output that exists."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"vocab_size": 2**24, "model_max_length": MOST_TOKENS, "max_mb": MOST_MB})
        longest = self.model_max_length
        require(longest is None or longest >= 1, "model_max_length", longest, "at least 1 token")
        require(self.vocab_size >= 259, "vocab_size", self.vocab_size, "at least 259: every byte and 3 special tokens")
        require(self.max_mb >= 1, "max_mb", self.max_mb, "at least 1 megabyte")
        special = (self.pad_token, self.bos_token, self.eos_token)
        require(len(set(special)) == 3 and all(special), "eos_token", self.eos_token, "special tokens must differ")


@dataclass
class InspectVerb:
    store: str | None = None
    """Directory of a token store."""
    samples: int = 2
    """Documents of each split to show the beginning of, decoded."""
    sample_tokens: int = 64
    """Tokens to show of each."""
    rows: int = 2
    """Training rows to show, decoded, each document of a row on its own: the first rows of a run of `seed`."""
    seq_len: int = 512
    """Tokens in a row."""
    packing: Packing = Packing.concat
    """How documents become rows, as `data.packing` of training."""
    seed: int = 0
    """The run's seed, which the order of the rows is a function of."""
    plot: str | None = None
    """PNG to write: documents and tokens by document length."""
    verify: bool = False
    """Read everything first and compare the checksums; a damaged file is an error that names it."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"samples": 10**4, "sample_tokens": 10**6, "rows": 10**4, "seq_len": MOST_TOKENS})
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        require(self.sample_tokens >= 1, "sample_tokens", self.sample_tokens, "at least 1")
        require(self.rows >= 0, "rows", self.rows, "0 or more")
        require(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2 tokens")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or a positive integer below 2**63")
        require(self.plot is None or self.plot.endswith(".png"), "plot", self.plot, "must end in .png")


@dataclass
class EvaluationSetsVerb:
    store: str | None = None
    """Directory of the token store whose held-out documents are taken."""
    output: str | None = None
    """Directory to write in: a token store per length, as OUTPUT/8192."""
    lengths: list[int] = field(default_factory=lambda: [8192, 16384, 32768, 65536, 131072])
    """Least tokens of a document, its EOS included, one set for each."""
    max_documents: int | None = None
    """Documents of a set at most, chosen by the hash of their text; by default all that are long enough."""
    overwrite: bool = False
    """Replace a set that exists and was asked for with other settings."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"lengths": MOST_TOKENS, "max_documents": 10**12})
        require(
            len(self.lengths) > 0 and all(n >= 2 for n in self.lengths),
            "lengths",
            self.lengths,
            "one or more lengths of at least 2 tokens",
        )
        require(
            self.max_documents is None or self.max_documents >= 1, "max_documents", self.max_documents, "at least 1"
        )


@dataclass
class EvaluationStore:
    path: str | None = None
    """Directory of the token store whose validation split is evaluated on; `evaluation=PATH` says the same."""


@dataclass
class DecontaminateVerb:
    train: str | None = None
    """Directory of the token store whose training split is trained on."""
    evaluation: EvaluationStore = field(default_factory=EvaluationStore)
    """The evaluation side; may be the same store, whose splits are then compared."""
    output: str | None = None
    """Directory of a store to write: the evaluation's validation split without the documents that were found."""
    report: str | None = None
    """Folder of report.json and report.md, written anew; by default OUTPUT, else EVALUATION, with .decontamination."""
    overwrite: bool = False
    """Replace an output that exists."""
    ngrams: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Words of an n-gram; similarity and containment are means over these sizes."""
    threshold: float = 0.1
    """Similarity (Jaccard of the documents' distinct n-grams) from which a pair of documents is contaminated."""
    containment: float = 0.5
    """Share of the evaluation document's n-grams found in one training document from which it is contaminated."""
    minhash_threshold: float | None = 0.5
    """Jaccard, estimated by MinHash, from which a pair is a near-duplicate; null: no MinHash."""
    shingle: int = 3
    """Words of the n-grams that MinHash looks at."""
    permutations: int = 128
    """Hash functions of a MinHash signature: the estimate's standard error is at most 0.5 / sqrt(permutations)."""
    workers: int = 1
    """Processes that read training documents; the result does not depend on it."""
    index_mb: int = 1024
    """Megabytes of evaluation n-grams in memory; what does not fit takes another pass over the training documents."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"ngrams": 64, "shingle": 64, "workers": MOST_WORKERS, "index_mb": MOST_MB})
        require(len(self.ngrams) > 0, "ngrams", self.ngrams, "name at least one size, such as [2,3,4]")
        require(
            all(n >= 1 for n in self.ngrams) and len(set(self.ngrams)) == len(self.ngrams),
            "ngrams",
            self.ngrams,
            "different sizes of at least 1 word",
        )
        for key in ("threshold", "containment", "minhash_threshold"):
            value = getattr(self, key)
            require(value is None or 0 < value <= 1, key, value, "a share above 0, at most 1")
        require(self.shingle >= 1, "shingle", self.shingle, "at least 1 word")
        require(16 <= self.permutations <= 4096, "permutations", self.permutations, "from 16 to 4096")
        require(self.workers >= 1, "workers", self.workers, "at least 1 process")
        require(self.index_mb >= 1, "index_mb", self.index_mb, "at least 1 megabyte")


def require_corpus(corpus: CorpusConfig) -> None:
    """Raise `ValueError` unless the corpus says what to read."""
    require(
        corpus.source is not CorpusSource.files or len(corpus.paths) > 0,
        "corpus.paths",
        corpus.paths,
        "nothing to read; add +corpus=NAME (see conf/corpus) or corpus.paths=[FILE,...]",
    )
    require(
        corpus.source is not CorpusSource.hub or corpus.hub is not None,
        "corpus.hub",
        corpus.hub,
        "name a data set of the hub, or a directory in its layout",
    )
