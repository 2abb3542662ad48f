r"""Cut a text into pieces such that the ids of the pieces, joined, are the ids of the whole text.

Two kinds of cuts are proven safe, for tokenizers that pass the checks on their `tokenizer.json`:

    between a letter and a space before a letter, `a| b` (ASCII letters)        the next piece begins with the space
    after a single line feed before a word character, `x\n|y` (x no white space)  the next piece begins with y

Proof. The accepted pre-tokenizers split by regular expressions whose alternatives are all in `LOCAL`. None matches
across a cut, none looks behind, and `(?!\S)` applies only to runs of white space, whose ends do not depend on the rest
of the text. So the pre-tokens of the pieces are those of the whole, except that a pre-token may span a cut where no
alternative matches; no token of the vocabulary spans a cut, so no BPE merge does either. Unicode normal forms leave
ASCII letters, spaces and line feeds alone, and compose nothing with the character before them. No added token spans a
cut or absorbs white space around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PIECE_CHARS = 1 << 14
"""Minimum characters of a piece; the engines are no faster on longer ones, and memory grows with them."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOCAL = frozenset(
    (
        *_GPT2.split("|"),
        *(pattern + suffix for pattern in _CASED for suffix in ("", f"{_CONTRACTIONS}?")),
        _CONTRACTIONS,
        "'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r"\p{N}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
    )
)
"""Alternatives of the published patterns (GPT-2, cl100k, Llama 3, Qwen, o200k and relatives); see the proof above."""

_AFTER_LETTER = r"[A-Za-z](?= [A-Za-z])"
_AFTER_LINE = r"\S\n(?=\w)"
_NORMAL_FORMS = ("NFC", "NFD")
_SPANNING = {
    True: ("[A-Za-z]\u0120", "\u010a(?![\u0120\u010a\u010d\u0109])[\\w\u00d7]"),
    False: ("[A-Za-z][\u2581 ]", "(\n|<0x0A>)\\w"),
}
"""Tokens that span a cut of the first and of the second kind, by whether the vocabulary is byte-level."""


@dataclass(frozen=True)
class Cutter:
    """Cuts texts after each match of `pattern`; the `drop` characters after a cut belong to no piece."""

    pattern: re.Pattern[str]
    drop: int = 0

    def __call__(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (piece, is_last); a piece reaches from `PIECE_CHARS` characters on to the next safe cut."""
        start = 0
        while match := self.pattern.search(text, start + PIECE_CHARS):
            yield text[start : match.end()], False
            # A normalizer that prepends "▁" restores the dropped space at the beginning of the next piece.
            start = match.end() + self.drop
        yield text[start:], True


class Uncuttable(ValueError):
    """Cutting is not proven to keep the ids of this tokenizer; the message gives the reason."""


def uncut(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the text as one piece."""
    yield text, True


def cutter(tokenizer_json: str) -> Cutter:
    """Return the function that cuts texts for a tokenizer.

    Raises:
        Uncuttable: no kind of cut is proven safe.
    """
    content = json.loads(tokenizer_json)
    _check_model(content["model"])
    pre_tokenizers = _steps(content.get("pre_tokenizer"), "pretokenizers")
    prepends = {_check_normalizer(step) for step in _steps(content.get("normalizer"), "normalizers")}
    prepends |= {_check_pre_tokenizer(step) for step in pre_tokenizers}
    _check_added_tokens(content.get("added_tokens") or [])
    # Only the vocabulary can join the two sides of a cut; merges produce tokens of the vocabulary.
    tokens = content["model"]["vocab"]
    spanning = _SPANNING[any(step["type"] == "ByteLevel" for step in pre_tokenizers)]
    places = []
    if not _any_matches(spanning[0], tokens):
        places.append(_AFTER_LETTER)
    # A piece would get the prefix that the tokenizer prepends to a text, unless it begins with a space itself.
    if not any(prepends) and not _any_matches(spanning[1], tokens):
        places.append(_AFTER_LINE)
    if not places:
        raise Uncuttable("its vocabulary has tokens of several words")
    return Cutter(re.compile("|".join(places)), drop=int("Prepend" in prepends))


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise Uncuttable(f"its model is {model.get('type')}, not BPE")
    # Dropout makes ids random; affixes tie a token to its place in a word, which the proof does not cover.
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Uncuttable("its BPE has dropout, or marks the inside or the end of words")
    if model.get("fuse_unk") and not model.get("byte_fallback"):
        raise Uncuttable("it fuses unknown characters")


def _check_normalizer(step: dict[str, Any]) -> str:
    """Return the name of the step if it prepends something, else an empty string."""
    if step["type"] in _NORMAL_FORMS or (step["type"] == "Replace" and step["pattern"] == {"String": " "}):
        return ""
    if step["type"] == "Prepend" and step["prepend"] == "\u2581":
        return "Prepend"
    raise Uncuttable(f"its normalizer {step['type']} is not known to treat pieces like the whole")


_LOCAL_STEPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ByteLevel": lambda step: True,
    "Digits": lambda step: True,
    "Metaspace": lambda step: True,
    "Split": lambda step: (
        step["behavior"] in ("Isolated", "Removed")
        and not step.get("invert")
        and set(_alternatives(step["pattern"].get("Regex", "?"))) <= LOCAL
        and _last_alternative_covers_lookahead(_alternatives(step["pattern"]["Regex"]))
    ),
}


def _check_pre_tokenizer(step: dict[str, Any]) -> str:
    """Return the name of the step if it prepends something, else an empty string."""
    is_local = _LOCAL_STEPS.get(step["type"])
    if is_local is None or not is_local(step):
        pattern = f" {step['pattern']}" if "pattern" in step else ""
        raise Uncuttable(f"its pre-tokenizer {step['type']}{pattern} is not known to treat pieces like the whole")
    prepends = step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never"
    return step["type"] if prepends else ""


def _last_alternative_covers_lookahead(alternatives: list[str]) -> bool:
    # `\s+(?!\S)` leaves the last white space before a word; without `\s+` at the end no alternative would match it.
    return r"\s+(?!\S)" not in alternatives or alternatives[-1] == r"\s+"


def _check_added_tokens(tokens: list[dict[str, Any]]) -> None:
    for token in tokens:
        if token.get("special"):
            continue  # the engines encode special tokens in a text as plain text
        if token.get("lstrip") or token.get("rstrip"):
            raise Uncuttable(f"its added token {token['content']!r} absorbs white space")
        if re.search("\n|[A-Za-z][\u2581 ]", token["content"]):
            raise Uncuttable(f"its added token {token['content']!r} may span a cut")


def _any_matches(pattern: str, tokens: dict[str, int]) -> bool:
    return any(map(re.compile(pattern).search, tokens))


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Flatten a (nested) sequence of steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[name] for step in _steps(inner, name)]


def _alternatives(pattern: str) -> list[str]:
    """Split a regular expression at its top-level bars, with possessive quantifiers made greedy."""
    # Possessive or greedy, the accepted alternatives match the same strings; only backtracking differs.
    found, depth, escaped = [""], 0, False
    pattern = pattern.replace("?+", "?").replace("++", "+")
    for character in pattern:
        if not escaped and character in "([":
            depth += 1
        elif not escaped and character in ")]":
            depth -= 1
        if character == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += character
        escaped = character == "\\" and not escaped
    return found
