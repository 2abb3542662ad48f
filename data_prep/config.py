"""Config of the data programs: one dataclass per verb of `python -m data_prep`, with a description of each field."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from clex_train.config.bos import Bos
from clex_train.config.data import Packing
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most
from clex_train.utils.files import require_plain_name

MOST_WORKERS = 1024
MOST_MB = 2**20
"""One terabyte."""


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
    """Name of the corpus; outputs go to corpora/NAME by default."""
    source: CorpusSource = CorpusSource.files
    """`files`: the files of `paths`; `hub`: a Hugging Face data set; `stdlib`: the standard library of this Python."""
    paths: list[str] = field(default_factory=list)
    """Files, directories (read recursively) and globs; .gz, .zst, .xz and .bz2 are decompressed while reading."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, or a local directory in the same layout; streamed."""
    hub_subset: str | None = None
    """Configuration ("subset") of the hub data set."""
    hub_split: str = "train"
    """Split of the hub data set. Its documents are split again by `validation_share`."""
    hub_revision: str | None = None
    """Commit, tag or branch of the hub data set; pin it to make the store reproducible."""
    format: Format = Format.auto
    """`auto` uses the file suffix: .jsonl .jsonlines .json .ndjson .txt .text .md, also compressed; .parquet."""
    text_field: str = "text"
    """Field of a record that contains the document; a dot descends into a nested record."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only records whose fields equal these values: +corpus.where={meta.redpajama_set_name: RedPajamaBook}."""
    validation_share: float = 0.01
    """Share of documents to hold out, in [0, 1]; a small corpus holds out at least two. The hash of a document's text
    decides, so that adding documents moves no other document."""
    split_field: str | None = None
    """Split by the value of this field instead of the text, to keep documents of one origin in one split."""
    on_bad_record: OnBadRecord = OnBadRecord.error
    """Stop at a record that cannot be used (`error`), or leave it out, log it and count it (`skip`)."""

    def __post_init__(self) -> None:
        # The name becomes part of output paths.
        require_plain_name("corpus.name", self.name, "it names the outputs by default")
        require(
            0 <= self.validation_share <= 1,
            "corpus.validation_share",
            self.validation_share,
            "must be a share in [0, 1]",
        )
        require(self.text_field != "", "corpus.text_field", "''", "name the field that holds the document")


@dataclass
class CorpusVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Corpus to read: a file of conf/corpus by `+corpus=NAME`, or single keys."""
    output: str = "corpora/${corpus.name}.jsonl.zst"
    """File to write, one {"text", "meta"} object per line: .jsonl, .jsonl.gz or .jsonl.zst."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        require_line_file(self.output)


@dataclass
class TokenizerConfig:
    path: str = "corpora/${corpus.name}_tokenizer"
    """Directory or hub name of a fast Hugging Face tokenizer with an EOS token; short form: `tokenizer=PATH`."""
    engine: EngineChoice = EngineChoice.auto
    """Library that encodes; the ids are the same. `auto`: gigatoken if it supports the tokenizer, else tokenizers."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the tokenizer to run. Use it only for repositories you have read."""


@dataclass
class TokenizeVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Corpus to read: a file of conf/corpus by `+corpus=NAME`, or single keys."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer and the library that runs it."""
    bos: Bos = Bos.auto
    """BOS at the beginning of every document; `auto` follows the tokenizer's default."""
    output: str = "corpora/${corpus.name}"
    """Directory of the token store to write."""
    workers: int = 1
    """Processes, each tokenizing whole shards; the store does not depend on the number. One process uses threads."""
    shard_mb: int = 256
    """Megabytes of source per shard: large .jsonl files are cut at line ends, small files share a shard."""
    overwrite: bool = False
    """Replace an existing or half-written store that was made with other settings."""

    def __post_init__(self) -> None:
        # Upper bounds catch typing errors before anything is allocated.
        require_at_most(self, "", {"workers": MOST_WORKERS, "shard_mb": MOST_MB})
        require(self.workers >= 1, "workers", self.workers, "at least 1 process")
        # Zero would make every line a shard of its own.
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "at least 1 megabyte")


@dataclass
class TrainTokenizerVerb:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Corpus to read: a file of conf/corpus by `+corpus=NAME`, or single keys. Held-out documents are not read."""
    output: str = "corpora/${corpus.name}_tokenizer"
    """Directory to write, in Hugging Face layout."""
    vocab_size: int = 2048
    """Vocabulary size in tokens, at least 259: 256 bytes, 3 special tokens, the rest merges."""
    model_max_length: int | None = None
    """Length in tokens beyond which the Hugging Face tokenizer warns; null: no limit."""
    pad_token: str = "<pad>"
    """Padding token, id 0."""
    bos_token: str = "<s>"
    """Beginning-of-sequence token, id 1."""
    eos_token: str = "</s>"
    """End-of-document token, id 2."""
    max_mb: int = 1024
    """Megabytes of text to learn from, taken from the beginning of the corpus."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"vocab_size": 2**24, "model_max_length": MOST_TOKENS, "max_mb": MOST_MB})
        longest = self.model_max_length
        require(longest is None or longest >= 1, "model_max_length", longest, "at least 1 token")
        # A byte-level BPE needs the full byte alphabet to encode any text without an unknown token.
        require(self.vocab_size >= 259, "vocab_size", self.vocab_size, "at least 259: every byte and 3 special tokens")
        require(self.max_mb >= 1, "max_mb", self.max_mb, "at least 1 megabyte")
        # Equal special tokens would share an id, and padding would end documents.
        special = (self.pad_token, self.bos_token, self.eos_token)
        require(len(set(special)) == 3 and all(special), "eos_token", self.eos_token, "special tokens must differ")


@dataclass
class InspectVerb:
    store: str | None = None
    """Directory of a token store."""
    samples: int = 2
    """Documents per split to show the beginning of, decoded."""
    sample_tokens: int = 64
    """Tokens to show of each document."""
    rows: int = 2
    """Training rows to show, decoded, with the documents of a row separated: the first rows of a run of `seed`."""
    seq_len: int = 512
    """Tokens per row."""
    packing: Packing = Packing.concat
    """Packing of documents into rows, as in `data.packing` of training."""
    seed: int = 0
    """Seed of the run, which determines the order of the rows."""
    plot: str | None = None
    """PNG file to write: documents and tokens by document length."""
    verify: bool = False
    """First read everything and compare the checksums; a damaged file is an error that names it."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"samples": 10**4, "sample_tokens": 10**6, "rows": 10**4, "seq_len": MOST_TOKENS})
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        require(self.sample_tokens >= 1, "sample_tokens", self.sample_tokens, "at least 1")
        require(self.rows >= 0, "rows", self.rows, "0 or more")
        require(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2 tokens")
        # numpy seeds are nonnegative; 2**63 keeps the value an int64 in YAML and JSON.
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or a positive integer below 2**63")
        # The suffix selects the format of matplotlib.
        require(self.plot is None or self.plot.endswith(".png"), "plot", self.plot, "must end in .png")


@dataclass
class EvaluationSetsVerb:
    store: str | None = None
    """Directory of the token store to take held-out documents from."""
    output: str | None = None
    """Directory to write to: one token store per length, such as OUTPUT/8192."""
    lengths: list[int] = field(default_factory=lambda: [8192, 16384, 32768, 65536, 131072])
    """Minimum document lengths in tokens, EOS included; one set for each."""
    max_documents: int | None = None
    """Maximum documents per set, chosen by the hash of their text; null: all that are long enough."""
    overwrite: bool = False
    """Replace an existing set that was made with other settings."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"lengths": MOST_TOKENS, "max_documents": 10**12})
        require(
            # A window needs one token to read and one to predict.
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
    """Directory of the token store whose validation split is used for evaluation; short form: `evaluation=PATH`."""


@dataclass
class DecontaminateVerb:
    train: str | None = None
    """Directory of the token store whose training split is used for training."""
    evaluation: EvaluationStore = field(default_factory=EvaluationStore)
    """Evaluation side; may be the same store, to compare its two splits."""
    output: str | None = None
    """Directory of a store to write: the validation split without the contaminated documents."""
    report: str | None = None
    """Directory for report.json and report.md, replaced if present; default: OUTPUT, else EVALUATION, plus
    .decontamination."""
    overwrite: bool = False
    """Replace an existing output."""
    ngrams: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Sizes of n-grams in words; similarity and containment are means over these sizes."""
    threshold: float = 0.1
    """Similarity (Jaccard index of distinct n-grams) from which a pair counts as contaminated, in (0, 1]."""
    containment: float = 0.5
    """Share of an evaluation document's n-grams in one training document from which it is contaminated, in (0, 1]."""
    minhash_threshold: float | None = 0.5
    """Jaccard index, estimated by MinHash, from which a pair is a near-duplicate, in (0, 1]; null: no MinHash."""
    shingle: int = 3
    """Words per n-gram for MinHash."""
    permutations: int = 128
    """Hash functions of a MinHash signature; the standard error of the estimate is at most 0.5 / sqrt(permutations)."""
    workers: int = 1
    """Processes that read training documents; the result does not depend on the number."""
    index_mb: int = 1024
    """Megabytes of evaluation n-grams in memory; the rest needs further passes over the training documents."""

    def __post_init__(self) -> None:
        # Repeated sizes would count twice in the means.
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
            require(value is None or 0 < value <= 1, key, value, "must be in (0, 1]")
        require(self.shingle >= 1, "shingle", self.shingle, "at least 1 word")
        # Fewer than 16 give an error above 0.12; a signature of 4,096 takes 16 kB per document.
        require(16 <= self.permutations <= 4096, "permutations", self.permutations, "from 16 to 4096")
        require(self.workers >= 1, "workers", self.workers, "at least 1 process")
        require(self.index_mb >= 1, "index_mb", self.index_mb, "at least 1 megabyte")


def require_corpus(corpus: CorpusConfig) -> None:
    """Raise `ConfigError` if the corpus names nothing to read."""
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
        "name a hub data set, or a local directory in the same layout",
    )


def require_line_file(output: str) -> None:
    """Raise `ConfigError` if the name of an output is not that of a file of JSON lines."""
    require(
        output.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")),
        "output",
        output,
        "must end in .jsonl, .jsonl.gz or .jsonl.zst",
    )
