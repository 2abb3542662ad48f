"""Engines that turn texts into ids: `tokenizers`, the reference, and `gigatoken`, which is many times faster.

Both return the tokenizer's ids without special tokens, and encode special tokens that occur in a text ("</s>" in a page
about HTML, or in an attack) as plain text. So EOS in a store always marks the end of a document.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clex_train.utils import log
from clex_train.utils.errors import ConfigError, first_line
from data_prep.config import EngineChoice

logger = log.get(__name__)

MAX_GROWTH_BYTES = 300_000_000
"""Growth of resident memory after which gigatoken's cache is dropped."""
_BLOCKS_OF_SYMBOLS = ((0x1F300, 0x1F650), (0x1F680, 0x1F6C6), (0xFE00, 0xFE10), (0x2E00, 0x2E50), (0x20B0, 0x20C0))
"""Emoji, variation selectors, book dashes and currencies: newer than Unicode 3.2, in all tables since 2019."""


class Engine(Protocol):
    name: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the uint32 ids of each text; special tokens are neither added nor recognized."""
        ...


class Unsupported(ValueError):
    """An engine cannot run a tokenizer; the message gives the reason."""


class TokenizersEngine:
    """Engine of Hugging Face `tokenizers`."""

    name = "tokenizers"

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A tokenizer.json may truncate or pad, which would cut documents silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Despite its name: encode special tokens in a text as plain text instead of recognizing them.
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


class GigatokenEngine:
    """Engine of `gigatoken`; texts on which the two engines may disagree go to `tokenizers`.

    Raises:
        Unsupported: gigatoken rejects the tokenizer, or its ids differ from those of `tokenizers` on one of `probes`.
    """

    name = "gigatoken"

    def __init__(self, tokenizer_json: str) -> None:
        content = json.loads(tokenizer_json)
        # gigatoken recognizes special tokens in a text and has no option against it, so take them out.
        content["added_tokens"] = [t for t in content.get("added_tokens") or [] if not t.get("special")]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        self._json = json.dumps(content)
        self._reference = TokenizersEngine(tokenizer_json)
        self._trusted = trusted_characters()
        self._parallel = num_threads() > 1
        self._tokenizer = self._begin()
        self._grown = 0
        texts = probes([token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or []])
        for text, ours, theirs in zip(texts, self.encode(texts), self._reference.encode(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise Unsupported(f"it gives other ids than tokenizers for {text[:40]!r}")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._encode(texts)
        # Its Unicode tables are newer than those of `tokenizers`; see `trusted_characters`.
        doubtful = self._doubtful(texts)
        for i, others in zip(doubtful, self._reference.encode([texts[i] for i in doubtful]), strict=True):
            ids[i] = others
        return ids

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # It caches the ids of every word it has seen and offers no limit, so watch the memory of the process.
        before = resident_bytes()
        rows = self._tokenizer.encode_batch(list(texts), parallel=self._parallel).layout
        offsets, content = np.asarray(rows.offsets.data), np.asarray(rows.content.data)
        ids = [content[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        self._grown += resident_bytes() - before
        if self._grown > MAX_GROWTH_BYTES:
            self._renew()
        return ids

    def _begin(self) -> Any:
        import gigatoken

        try:
            return gigatoken.Tokenizer.from_json(self._json)
        except Exception as error:  # RuntimeError or ValueError, without a pattern
            raise Unsupported(first_line(error)) from error

    def _renew(self) -> None:
        self._tokenizer = None
        gc.collect()
        _return_free_memory()
        self._tokenizer = self._begin()
        self._grown = 0

    def _doubtful(self, texts: Sequence[str]) -> list[int]:
        """Return the indices of texts with untrusted characters."""
        # One check over the joined batch is cheap, and most batches pass.
        if all(map(str.isascii, texts)) or self._all_trusted("".join(texts)):
            return []
        return [i for i, text in enumerate(texts) if not self._all_trusted(text)]

    def _all_trusted(self, text: str) -> bool:
        if text.isascii():
            return True
        return bool(self._trusted[np.frombuffer(text.encode("utf-32-le"), np.uint32)].all())


ENGINES: dict[str, type[TokenizersEngine] | type[GigatokenEngine]] = {
    "tokenizers": TokenizersEngine,
    "gigatoken": GigatokenEngine,
}


def choose(choice: EngineChoice, tokenizer_json: str) -> str:
    """Choose the engine, log the choice and return its name.

    Raises:
        ConfigError: gigatoken is required but not installed, or cannot run the tokenizer.
    """
    if choice is EngineChoice.tokenizers:
        return choice.name
    try:
        if importlib.util.find_spec("gigatoken") is None:
            raise Unsupported("it is not installed (pip install gigatoken)")
        GigatokenEngine(tokenizer_json)
    except Unsupported as error:
        if choice is EngineChoice.gigatoken:
            remedy = "set tokenizer.engine=auto or tokenizers"
            raise ConfigError("tokenizer.engine", "gigatoken", f"cannot be used: {error}; {remedy}") from error
        logger.info("tokenizing with tokenizers; the faster gigatoken cannot be used: %s", error)
        return EngineChoice.tokenizers.name
    logger.info("tokenizing with gigatoken, checked against tokenizers")
    return EngineChoice.gigatoken.name


@functools.lru_cache(maxsize=2)
def load(name: str, tokenizer: Path) -> Engine:
    """Load an engine for a tokenizer directory; cached, since loading takes as long as encoding megabytes of text."""
    return ENGINES[name]((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))


def probes(added_tokens: Sequence[str]) -> list[str]:
    """Return texts on which engines with different readings of a tokenizer give different ids."""
    texts = [
        "It's the cat's; they'LL say I'm 12345 years, we've 1/2 & naïve café. HELLOworld helloWORLD HTTPServer",
        "  two   spaces\t\ttabs \n\n\r\nlines\n \n  end   ",
        "a\x00b\x01\x7f\x85\xa0c\u200b\u200dd\u2028e\ufefff\u3000g",
        "e\u0301 A\u030a \u1100\u1161\u11a8 \u0928\u093f q\u0323\u0307 \u212b \ufb01 \u2460 \u00bd",
        "橋を渡る。漢字\nかな 한국어 текст עברית العربية ไทย 👩‍👩‍👧‍👦🇩🇪✌️🌉",
        *(character * 300 for character in "a -1=\n\t橋"),
    ]
    return texts + [f"x{token} {token}{token}y <{token.strip('<>')}>" for token in added_tokens[:100]]


@functools.cache
def trusted_characters() -> np.ndarray:
    """Return bool [0x110000]: characters assigned in Unicode 3.2 (2002), and blocks of symbols."""
    # Unicode never changes the normal forms of an assigned character, and hardly ever its category after so long. So
    # the tables of both libraries agree on these characters.
    trusted = np.zeros(0x110000, bool)
    for point in range(0x30000):
        character = chr(point)
        trusted[point] = "Cn" not in (unicodedata.category(character), unicodedata.ucd_3_2_0.category(character))
    for start, stop in _BLOCKS_OF_SYMBOLS:
        trusted[start:stop] = True
    return trusted


def num_threads() -> int:
    """Return the threads that either engine uses in this process."""
    # Affinity, not cpu_count: a SLURM job or container may own a few cores of a large node.
    return int(os.environ.get("RAYON_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Return freed memory to the system, which glibc does only on request."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
