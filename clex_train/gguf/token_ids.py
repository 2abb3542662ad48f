"""Token ids as llama.cpp computes them from a GGUF vocabulary, compared with those of transformers.

llama.cpp has a fixed list of splitting regexes, chosen by `tokenizer.ggml.pre`. A wrong name gives other ids without a
word, so the name is found by comparison: words and ids of sample texts, and of every token's own text, have to agree.
The written file is then read back and compared again.
"""

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from clex_train.gguf.vocabulary import BPE, BYTE, CONTROL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary
from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer

logger = log.get(__name__)

SAMPLES = (
    "Hello, world! It's 3 o'clock; we've 12,345 reasons, they'd say. I'LL SHOUT, IT'S FINE. 'twas 1999-12-31 23:59",
    "def f(x_1: int = 0x1F) -> dict[str, Any]:\n\treturn {**x, 'a': [1, 2.5e-10]}  # why?\n\n\n    if x != y or z:\n",
    '#include <stdio.h>\r\nint main(void) { printf("%d\\n", a->b[10] << 2); /* camelCase HTTPServer */ }\r\n\r\n',
    "Où est l'été ? Ça coûte 12 €, naïve façade — «über» straße, Ελληνικά, Русский язык, İstanbul, ǅungla",
    "漢字かな交じり文、한국어 텍스트。 العربية ١٢٣ עברית, 12万3456",
    "👍🏽 👩‍👩‍👧 🇫🇷 emoji🙂🙂 x² ½ Ⅷ ①②③ ∑∫√ ™©",
    "  two   three    four\t\ttabs \n  \n \u00a0nbsp\u2003em\u3000wide   end  ",
    "a",
    " ",
    "\n",
    "\n\n \n",
    " leading and trailing ",
    "http://example.org/a_b?c=d&e=%20#f ... ---- ===== !!!??? $100 50% (a) [b] {c} <d/> `e` ~f~ ^g^ |h| \\i\\",
)
"""Composed (NFC) texts that tell the splitting regexes apart."""
RARE = ("हिन्दी में २०२४, ภาษาไทยที่นี่, Việt Nam", "naïveÉtat straßeÜber ΑθήναΣε МоскваИ")
"""Texts with combining marks, or capitals beyond ASCII inside a word."""


class Split(NamedTuple):
    """Splitting of text into words, and whether words of the vocabulary skip the merges."""

    pattern: str | None
    """None for the regex of GPT-2, which `tokenizers` has built in."""
    ignores_merges: bool = False
    splits_digits: bool = False
    is_approximate: bool = False
    """llama.cpp's regex differs from the published one in texts like those of `RARE`."""


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}"
ONE_DIGIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{MARKS}"
# llama.cpp's regex engine has no classes of upper and lower case: a letter counts as both unless it is ASCII.
UPPER, LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
CAMEL = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
CAMEL_WORDS = CAMEL % ("", "")
CAMEL_CONTRACTED = CAMEL % (f"{CONTRACTIONS}?", f"{CONTRACTIONS}?")

SPLITS = {
    "gpt-2": Split(None),
    "smollm": Split(None, splits_digits=True),
    "llama-bpe": Split(THREE_DIGITS, ignores_merges=True),
    "dbrx": Split(THREE_DIGITS),
    "qwen2": Split(ONE_DIGIT),
    "gpt-4o": Split(rf"{CAMEL_CONTRACTED}|\p{{N}}{{1,3}}|{MARKS_OR_SLASH}", is_approximate=True),
    "tekken": Split(rf"{CAMEL_WORDS}|\p{{N}}|{MARKS_OR_SLASH}", ignores_merges=True, is_approximate=True),
}
"""Splitting by the values of `tokenizer.ggml.pre` that are tried, in this order."""


@dataclass(frozen=True)
class Difference:
    """First text that llama.cpp reads as other ids."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        pairs = zip([*self.expected, None], [*self.found, None], strict=False)
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        return (
            f"other ids for {self.text[:40]!r} from token {place} on ({len(self.found)} ids, {len(self.expected)} here)"
        )


def choose_pre(vocabulary: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary with the first `pre` whose words and ids are those of the tokenizer.

    Raises:
        ConfigError: none of them; names the nearest.
    """
    if vocabulary.model != BPE:
        return vocabulary
    failures: dict[str, Difference] = {}
    ignores_merges = bool(tokenizer.backend_tokenizer.model.ignore_merges)
    # Both spellings of one regex may fit; the one that treats merges alike first.
    for name in sorted(SPLITS, key=lambda name: SPLITS[name].ignores_merges != ignores_merges):
        candidate = replace(vocabulary, pre=name)
        difference = _different_words(name, tokenizer)
        difference = difference or next(_differences(candidate, tokenizer, _strict(SPLITS[name])), None)
        if difference is None:
            return candidate
        failures[name] = difference
    # The one that agrees on most samples says most about the reason.
    nearest = max(failures, key=lambda name: [*SAMPLES, *RARE].index(failures[name].text))
    raise ConfigError(
        "tokenizer",
        None,
        f"no splitting regex of llama.cpp known here fits it: the nearest, {nearest}, gives {failures[nearest]}; "
        "convert the plain model with llama.cpp's convert_hf_to_gguf.py and add the factors to that file",
    )


def verify(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Compare ids of the samples, of every token's own text, and of special tokens inside a text.

    Raises:
        ConfigError: llama.cpp would read a text as other ids.
    """
    own = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    ids = partial(_differences, vocabulary, tokenizer)
    for difference in ids([*SAMPLES, *RARE, *own]):
        if not _is_tolerated(vocabulary, difference.text):
            raise ConfigError("tokenizer", None, f"llama.cpp would read text differently: {difference}")
    if (rare := next(ids(RARE), None)) is not None:
        logger.warning("llama.cpp's regex %s is an approximation: %s", vocabulary.pre, rare)
    special = [f"a{token}b" for token in _added(vocabulary)]
    if (changed := next(ids(special), None)) is None:
        return
    if vocabulary.model == BPE:
        raise ConfigError("tokenizer", None, f"llama.cpp would read text with special tokens differently: {changed}")
    # The choice is per text in transformers and per fragment in llama.cpp; no key of the header says otherwise.
    logger.warning("llama.cpp puts a space after special tokens inside a text, transformers does not: %s", changed)


def encoder(vocabulary: Vocabulary) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return a function from texts to their ids in llama.cpp, with BOS and EOS where the vocabulary adds them."""
    inner = _bpe_encoder(vocabulary) if vocabulary.model == BPE else _piece_encoder(vocabulary)
    before = [vocabulary.special["bos"]] if vocabulary.adds_bos else []
    after = [vocabulary.special["eos"]] if vocabulary.adds_eos else []
    return lambda texts: [[*before, *ids, *after] for ids in inner(texts)]


def _strict(split: Split) -> tuple[str, ...]:
    return SAMPLES if split.is_approximate else (*SAMPLES, *RARE)


def _is_tolerated(vocabulary: Vocabulary, text: str) -> bool:
    """Return True for a text beyond ASCII, not a sample, that no GGUF file of this tokenizer reads exactly."""
    is_approximate = vocabulary.model == BPE and SPLITS[vocabulary.pre].is_approximate
    return is_approximate and text not in SAMPLES and not text.isascii()


def _differences(vocabulary: Vocabulary, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Difference]:
    batched: Any = tokenizer
    expected: list[list[int]] = batched(list(texts), verbose=False)["input_ids"]
    for text, ours, theirs in zip(texts, expected, encoder(vocabulary)(texts), strict=True):
        if ours != theirs:
            yield Difference(text, ours, theirs)


def _different_words(name: str, tokenizer: Tokenizer) -> Difference | None:
    """Compare the words, which a small vocabulary may not show in its ids."""
    backend = tokenizer.backend_tokenizer
    split = _splitter(SPLITS[name])
    for text in _strict(SPLITS[name]):
        shown = backend.normalizer.normalize_str(text) if backend.normalizer else text
        ours = [len(word) for word, _ in backend.pre_tokenizer.pre_tokenize_str(shown)]
        theirs = [len(word) for word, _ in split.pre_tokenize_str(text)]
        if ours != theirs:
            return Difference(text, ours, theirs)
    return None


def _added(vocabulary: Vocabulary) -> list[str]:
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [token for token, kind in pairs if kind in (CONTROL, USER_DEFINED, UNKNOWN)]


def _splitter(split: Split) -> Any:
    if split.pattern is None:
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.splits_digits else []
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _bpe_encoder(vocabulary: Vocabulary) -> Callable[[Sequence[str]], list[list[int]]]:
    split = SPLITS[vocabulary.pre]
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in vocabulary.merges or [])]
    inner = tokenizers.Tokenizer(models.BPE(numbers, merges, ignore_merges=split.ignores_merges))
    inner.pre_tokenizer = _splitter(split)
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in _added(vocabulary)])
    return lambda texts: [each.ids for each in inner.encode_batch(list(texts), add_special_tokens=False)]


def _piece_encoder(vocabulary: Vocabulary) -> Callable[[Sequence[str]], list[list[int]]]:
    pieces = _Pieces(vocabulary)
    return lambda texts: [pieces.encode(text) for text in texts]


class _Pieces:
    """llama.cpp's SentencePiece: special tokens first, then the neighbours whose merged token has the highest score."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
        self.scores = vocabulary.scores or []
        self.adds_space = vocabulary.adds_space
        kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
        self.bytes = {int(token[3:5], 16): self.numbers[token] for token, kind in kinds if kind == BYTE}
        # The longest first, so that no special token hides inside another one's match.
        special = sorted(map(re.escape, _added(vocabulary)), key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(special)})") if special else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        found: list[int] = []
        # Odd fragments are the special tokens; every other one stands at the start or behind one.
        for place, fragment in enumerate(self.special.split(text) if self.special else [text]):
            if place % 2:
                found.append(self.numbers[fragment])
            elif fragment:
                found += self._merge(((" " if self.adds_space else "") + fragment).replace(" ", SPACE))
        return found

    def _merge(self, text: str) -> list[int]:
        symbols, ahead = list(text), list(range(1, len(text) + 1))
        behind = list(range(-1, len(text) - 1))
        queue = [pair for i in range(1, len(text)) if (pair := self._pair(symbols, i - 1, i))]
        heapq.heapify(queue)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            # One of the two was merged with another neighbour since.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            ahead[left] = ahead[right]
            if ahead[left] < len(symbols):
                behind[ahead[left]] = left
            for pair in (self._pair(symbols, behind[left], left), self._pair(symbols, left, ahead[left])):
                if pair:
                    heapq.heappush(queue, pair)
        return [number for symbol in symbols if symbol for number in self._ids(symbol)]

    def _pair(self, symbols: Sequence[str], left: int, right: int) -> tuple[float, int, int, int] | None:
        """Return a pair as an item of the queue: the highest score first, the leftmost of equal ones."""
        if left < 0 or right >= len(symbols):
            return None
        merged = symbols[left] + symbols[right]
        number = self.numbers.get(merged)
        return None if number is None else (-self.scores[number], left, right, len(merged))

    def _ids(self, symbol: str) -> list[int]:
        number = self.numbers.get(symbol)
        # A character without a token is spelled in bytes; -1 for a byte that has none, where llama.cpp fails.
        return [number] if number is not None else [self.bytes.get(byte, -1) for byte in symbol.encode()]
