"""Benchmark the data path: from files to a store, against `tokenizers` on the same text in memory, and to batches.

    python benchmarks/bench_data.py tokenizing --texts ../data/book/*.jsonl.zst [--gigabytes 1] [--output FILE.md]
    python benchmarks/bench_data.py loading [--output FILE.md]
    python benchmarks/bench_data.py checks [--output FILE.md]

Tokenizing: the texts are repeated to the requested size, one file per copy, compressed like the first one; an 8k byte-
level BPE is trained on one copy. "Raw" is `tokenizers.Tokenizer.encode_batch` on one copy in memory, for whole
documents and, faster, for the same documents in pieces of 16,384 characters. Ours is `python -m data_prep tokenize`
from files to a finished store, one worker, called in this process after a small store, which excludes imports. All have
the same number of threads and take turns; medians. In the corpus "altered" the letters of every tenth word of each
copy are shuffled, so that caches of words meet new ones as in text without repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zstandard
from bench_page import processor, publish
from data_loading import loading
from store_checks import checks

PIECE_CHARS = 1 << 14


def main() -> None:
    """Print one Markdown page, and write it to `--output`."""
    arguments = parse()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # Must be set before either engine starts its threads.
    publish([*header(arguments), *arguments.section(arguments)], arguments.output)


def parse() -> argparse.Namespace:
    """Parse the section to measure and its sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(required=True, metavar="SECTION")
    tokenize = sections.add_parser("tokenizing", help="files to a token store")
    tokenize.set_defaults(section=tokenizing)
    tokenize.add_argument("--texts", type=Path, nargs="+", required=True, help=".jsonl files, also compressed")
    tokenize.add_argument("--gigabytes", type=float, default=1.0, help="text to tokenize")
    tokenize.add_argument("--repeats", type=int, default=3)
    tokenize.add_argument("--vocab-size", type=int, default=8192)
    tokenize.add_argument("--folder", type=Path, help="where to write corpora and stores; by default a temporary one")
    load = sections.add_parser("loading", help="a token store to batches")
    load.set_defaults(section=loading)
    load.add_argument("--repeats", type=int, default=5)
    load.add_argument("--folder", type=Path, help="where to write stores; by default a temporary one")
    check = sections.add_parser("checks", help="checksums of a token store, and opening it")
    check.set_defaults(section=checks)
    check.add_argument("--repeats", type=int, default=5)
    check.add_argument("--megabytes", type=int, default=400, help="tokens that are really there")
    check.add_argument("--documents", type=int, nargs="+", default=[10**6, 10**7], help="of the stores to open")
    check.add_argument("--folder", type=Path, help="where to write stores; by default a temporary one")
    for section in (tokenize, load, check):
        section.add_argument("--threads", type=int, default=os.cpu_count())
        section.add_argument("--output", type=Path)
    return parser.parse_args()


def header(arguments: argparse.Namespace) -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "tokenizers", "gigatoken"))
    return [
        "# The data path",
        "",
        f"`python benchmarks/bench_data.py {' '.join(sys.argv[1:])}` at {commit.stdout.strip()}, "
        f"Python {platform.python_version()}, {packages}, {processor()} with {os.cpu_count()} processors, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}",
    ]


def tokenizing(arguments: argparse.Namespace) -> list[str]:
    """Measure megabytes of text per second from files to the store, and the ratio to `tokenizers`."""
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="bench_data_"))
    try:
        return _tokenizing(arguments, folder)
    finally:
        shutil.rmtree(folder)


def _tokenizing(arguments: argparse.Namespace, folder: Path) -> list[str]:
    texts = read_texts(arguments.texts)
    # Repeating a small text reaches any size without shipping a large corpus.
    copies = max(1, round(arguments.gigabytes * 1e9 / num_bytes(texts)))
    learn_tokenizer(texts, arguments.vocab_size, folder / "tokenizer")
    # A first run on a small store imports and compiles everything outside the timing.
    write_copies(folder / "small", [texts[0][:100_000]], 1, alter=False)
    write_copies(folder / "repeated", texts, copies, alter=False)
    write_copies(folder / "altered", texts, copies, alter=True)
    # `tokenizers` is faster on pieces, so the comparison with it must not be unfair.
    pieces = [text[i : i + PIECE_CHARS] for text in texts for i in range(0, len(text), PIECE_CHARS)]
    # Rates are per byte of text, so one copy in memory compares with many copies on disk.
    whole, total = num_bytes(texts), num_bytes(texts) * copies
    encode = raw_tokenizer(folder / "tokenizer")
    rivals: dict[str, tuple[int, Callable[[], object]]] = {
        "raw `tokenizers`, whole documents": (whole, lambda: encode(texts)),
        "raw `tokenizers`, pieces": (whole, lambda: encode(pieces)),
        "ours, tokenizers": (total, lambda: tokenize(folder, "repeated", "tokenizers")),
        "ours, gigatoken": (total, lambda: tokenize(folder, "repeated", "gigatoken")),
        "ours, gigatoken, altered": (total, lambda: tokenize(folder, "altered", "gigatoken")),
    }
    for engine in ("tokenizers", "gigatoken"):
        tokenize(folder, "small", engine)
    rates = time_in_turns(rivals, arguments.repeats)
    table = ["", f"## Tokenising {total / 1e9:.2f} GB of text, {arguments.vocab_size} tokens", ""]
    table += ["| | MB/s | times raw, whole documents | times raw, pieces |", "|---|--:|--:|--:|"]
    raw, raw_pieces = rates["raw `tokenizers`, whole documents"], rates["raw `tokenizers`, pieces"]
    return table + [
        f"| {name} | {rate:.2f} | {rate / raw:.2f} | {rate / raw_pieces:.2f} |" for name, rate in rates.items()
    ]


def read_texts(files: Iterable[Path]) -> list[str]:
    """Read the documents of the files as the data programs do."""
    from data_prep.config import CorpusConfig
    from data_prep.corpus.documents import documents
    from data_prep.corpus.sources import plan

    corpus = CorpusConfig(paths=[str(file) for file in files])
    units = plan(corpus, 1 << 62)
    return [
        document.text for unit in units for piece in unit.pieces for document in documents(piece, corpus, Counter())
    ]


def learn_tokenizer(texts: list[str], vocab_size: int, output: Path) -> None:
    """Train a byte-level BPE on the texts."""
    from data_prep import train_tokenizer
    from data_prep.config import CorpusConfig, TrainTokenizerVerb

    config = TrainTokenizerVerb(corpus=CorpusConfig(), vocab_size=vocab_size)
    train_tokenizer.train(iter(texts), config).save_pretrained(output)


def write_copies(folder: Path, texts: list[str], copies: int, *, alter: bool) -> None:
    """Write one compressed file per copy; with `alter`, every copy has a different text."""
    folder.mkdir()
    for copy in range(copies):
        chosen = [altered(text, copy) for text in texts] if alter else texts
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        (folder / f"{copy:04d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


def altered(text: str, seed: int) -> str:
    """Shuffle the letters of every tenth word."""
    # Every tenth word differs: caches of words then meet new ones, as in a text that does not repeat.
    generator = random.Random(seed)
    words = text.split(" ")
    for i in range(generator.randrange(10), len(words), 10):
        words[i] = "".join(generator.sample(words[i], len(words[i])))
    return " ".join(words)


def raw_tokenizer(directory: Path) -> Callable[[list[str]], object]:
    """Return a function that runs `encode_batch` of Hugging Face tokenizers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False)


def tokenize(folder: Path, corpus: str, engine: str) -> None:
    """Run `python -m data_prep tokenize` after its imports, and remove the store."""
    from data_prep.config import CorpusConfig, EngineChoice, TokenizerConfig, TokenizeVerb
    from data_prep.tokenize import run as program

    output = folder / f"{corpus}_{engine}"
    program.run(
        TokenizeVerb(
            corpus=CorpusConfig(paths=[str(folder / corpus)]),
            tokenizer=TokenizerConfig(str(folder / "tokenizer"), EngineChoice[engine]),
            output=str(output),
        )
    )
    # A finished store would make the next call return at once.
    shutil.rmtree(output)


def time_in_turns(rivals: dict[str, tuple[int, Callable[[], object]]], repeats: int) -> dict[str, float]:
    """Return the median megabytes per second of each side, alternating in every round."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, (size, run) in rivals.items():
            began = time.perf_counter()
            run()
            rates[name].append(size / (time.perf_counter() - began) / 1e6)
    return {name: statistics.median(values) for name, values in rates.items()}


def num_bytes(texts: Iterable[str]) -> int:
    """Return the length in bytes of UTF-8."""
    return sum(len(text.encode()) for text in texts)


if __name__ == "__main__":
    main()
