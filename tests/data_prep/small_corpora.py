"""Helpers that write a small corpus, tokenize it and read the store back."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from tokenizers import Tokenizer

from clex_train.token_store.store import TokenStore
from data_prep.config import CorpusConfig, EngineChoice, TokenizerConfig, TokenizeVerb
from data_prep.tokenize import run as tokenize

TEXTS = [
    "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 3,
    "Ein Weiser geht über die Brücke; 橋を渡る 🌉 naïve café.",
    "def f(x):\n\treturn x ** 2\r\n\n\n# zero\x00width\u200b\n",
    "   leading and trailing spaces   ",
    "1234567890 " * 40,
]


def jsonl(records: Iterable[Any]) -> bytes:
    """Encode records as JSON lines; a str or bytes is used as the line itself."""
    lines = [
        r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode() for r in records
    ]
    return b"".join(line + b"\n" for line in lines)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write records, compressed according to the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)(jsonl(records)))
    return path


def stored_texts(store: TokenStore, step: int = 1) -> list[str]:
    """Decode every `step`-th document of a split; check and remove its EOS."""
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path / "tokenizer.json"))
    texts = []
    for _, start, stop in islice(store.documents(), 0, None, step):
        ids = store.tokens(start, stop).tolist()
        assert ids.pop() == store.eos_id
        texts.append(tokenizer.decode(ids, skip_special_tokens=False))
    return texts


def files_of(store: Path) -> dict[str, bytes]:
    """Return the content of every file of a store by relative path."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def tokenize_files(paths: list[Path | str], tokenizer: Path, output: Path, **settings: Any) -> TokenStore:
    """Tokenize files without a validation split; `settings` may be keys of the verb or of the corpus."""
    verb = {key: settings.pop(key) for key in ("workers", "shard_mb", "overwrite", "bos") if key in settings}
    runs = TokenizerConfig(str(tokenizer), EngineChoice[settings.pop("engine", "auto")])
    corpus = CorpusConfig(**{"paths": [str(path) for path in paths], "validation_share": 0.0} | settings)
    tokenize.run(TokenizeVerb(corpus=corpus, tokenizer=runs, output=str(output), **verb))
    return TokenStore(output)
