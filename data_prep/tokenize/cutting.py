r"""Where a text may be cut so that the ids of the pieces, joined, are the ids of the whole.

Two places, for tokenizers of which it can be proved from their `tokenizer.json`:

    between a letter and a space before a letter, `a| b` (ASCII letters)        the next piece begins with the space
    after a single line feed before a word character, `x\n|y` (x no white space)  the next piece begins with y

Proof. The pre-tokenizers accepted here are splits by regular expressions whose every alternative is one of
`LOCAL`: none has a match that contains a cut, none looks behind, and `(?!\S)` is asked of white space runs only, whose
ends are the same with and without the rest of the text. So the pre-tokens of the pieces are those of the whole, except
that a pre-token may span a cut where no alternative matches; and since no token of the vocabulary spans a cut, no merge
of BPE does. Unicode's normal forms leave ASCII letters, space and line feed alone and compose nothing with what stands
before these. No added token spans a cut or takes in white space around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PIECE_CHARS = 1 << 14

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
"""Alternatives of the published patterns (GPT-2, cl100k, Llama 3, Qwen, o200k and their kin); see the proof above."""

_AFTER_LETTER = r"[A-Za-z](?= [A-Za-z])"
_AFTER_LINE = r"\S\n(?=\w)"
_NORMAL_FORMS = ("NFC", "NFD")
_SPANNING = {
    True: ("[A-Za-z]\u0120", "\u010a(?![\u0120\u010a\u010d\u0109])[\\w\u00d7]"),
    False: ("[A-Za-z][\u2581 ]", "(\n|<0x0A>)\\w"),
}
"""Tokens that span the first and the second kind of place, in a byte-level vocabulary and in one of characters."""


@dataclass(frozen=True)
class Cutter:
    """Cuts texts after each match of `pattern`; `drop` characters at a cut are not part of any piece."""

    pattern: re.Pattern[str]
    drop: int = 0

    def __call__(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (piece, whether it is the last), each of `PIECE_CHARS` characters or as far as the next cut."""
        start = 0
        while match := self.pattern.search(text, start + PIECE_CHARS):
            yield text[start : match.end()], False
            start = match.end() + self.drop
        yield text[start:], True


class Uncuttable(ValueError):
    """It cannot be proved for this tokenizer that cutting a text keeps its ids; the message says why."""


def uncut(text: str) -> Iterator[tuple[str, bool]]:
    """The text as one piece."""
    yield text, True


def cutter(tokenizer_json: str) -> Cutter:
    """What cuts texts for a tokenizer.

    Raises:
        Uncuttable: nothing can be proved of it.
    """
    content = json.loads(tokenizer_json)
    _check_model(content["model"])
    pre_tokenizers = _steps(content.get("pre_tokenizer"), "pretokenizers")
    prepends = {_check_normalizer(step) for step in _steps(content.get("normalizer"), "normalizers")}
    prepends |= {_check_pre_tokenizer(step) for step in pre_tokenizers}
    _check_added_tokens(content.get("added_tokens") or [])
    tokens = content["model"]["vocab"]
    spanning = _SPANNING[any(step["type"] == "ByteLevel" for step in pre_tokenizers)]
    places = []
    if not _any_matches(spanning[0], tokens):
        places.append(_AFTER_LETTER)
    # What a tokenizer prepends to a text it would prepend to a piece, unless this begins with a space of its own.
    if not any(prepends) and not _any_matches(spanning[1], tokens):
        places.append(_AFTER_LINE)
    if not places:
        raise Uncuttable("its vocabulary has tokens of several words")
    return Cutter(re.compile("|".join(places)), drop=int("Prepend" in prepends))


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise Uncuttable(f"its model is {model.get('type')}, not BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Uncuttable("its BPE has dropout, or marks the inside or the end of words")
    if model.get("fuse_unk") and not model.get("byte_fallback"):
        raise Uncuttable("it joins unknown characters")


def _check_normalizer(step: dict[str, Any]) -> str:
    """The name of the step if it prepends something, else ''."""
    if step["type"] in _NORMAL_FORMS or (step["type"] == "Replace" and step["pattern"] == {"String": " "}):
        return ""
    if step["type"] == "Prepend" and step["prepend"] == "\u2581":
        return "Prepend"
    raise Uncuttable(f"its normalizer {step['type']} is not known to treat pieces as the whole")


_LOCAL_STEPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ByteLevel": lambda step: True,
    "Digits": lambda step: True,
    "Metaspace": lambda step: True,
    "Split": lambda step: (
        step["behavior"] in ("Isolated", "Removed")
        and not step.get("invert")
        and set(_alternatives(step["pattern"].get("Regex", "?"))) <= LOCAL
        and _takes_what_looking_ahead_leaves(_alternatives(step["pattern"]["Regex"]))
    ),
}


def _check_pre_tokenizer(step: dict[str, Any]) -> str:
    """The name of the step if it prepends something, else ''."""
    if not _LOCAL_STEPS.get(step["type"], lambda _: False)(step):
        pattern = f" {step['pattern']}" if "pattern" in step else ""
        raise Uncuttable(f"its pre-tokenizer {step['type']}{pattern} is not known to treat pieces as the whole")
    prepends = step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never"
    return step["type"] if prepends else ""


def _takes_what_looking_ahead_leaves(alternatives: list[str]) -> bool:
    return r"\s+(?!\S)" not in alternatives or alternatives[-1] == r"\s+"


def _check_added_tokens(tokens: list[dict[str, Any]]) -> None:
    for token in tokens:
        if token.get("special"):
            continue  # a special token in a text is plain text
        if token.get("lstrip") or token.get("rstrip"):
            raise Uncuttable(f"its added token {token['content']!r} takes in white space")
        if re.search("\n|[A-Za-z][\u2581 ]", token["content"]):
            raise Uncuttable(f"its added token {token['content']!r} may span a cut")


def _any_matches(pattern: str, tokens: dict[str, int]) -> bool:
    return any(map(re.compile(pattern).search, tokens))


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a (nested) sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[name] for step in _steps(inner, name)]


def _alternatives(pattern: str) -> list[str]:
    """A regular expression cut at the bars outside brackets and parentheses, possessive quantifiers as greedy ones."""
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
