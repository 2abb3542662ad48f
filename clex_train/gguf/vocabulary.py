"""Vocabulary of a GGUF file: the tokenizer of a Hugging Face directory in llama.cpp's terms.

    gpt2     byte-level BPE: tokens, merges, and the name of a splitting regex (`tokenizer.ggml.pre`)
    llama    SentencePiece BPE: tokens and scores, the higher the earlier a token is merged

Fast tokenizers alone are read, from the JSON of the `tokenizers` library. Whether llama.cpp reads text the same way is
verified by `token_ids`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clex_train.gguf.files import Field, contents, gguf_package
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.records import parse_json

logger = log.get(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, numbered as in llama.cpp."""
BPE, SENTENCE_PIECE = "gpt2", "llama"
"""Names of the two kinds of vocabulary (`tokenizer.ggml.model`)."""
SPACE = "▁"
NEVER_MERGED = -1e9
SPECIAL = ("bos", "eos", "unknown", "padding")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that llama.cpp knows about a tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    """Priority of each token in merging (SentencePiece)."""
    merges: list[str] | None
    """Pairs in the order of merging, "left right" (byte-level BPE)."""
    special: dict[str, int]
    """Ids of the tokens named in `SPECIAL`, where there are any."""
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    """A space is put before a text, and after special tokens in it (SentencePiece)."""

    def fields(self, chat_template: str | Mapping[str, str] | None = None) -> list[Field]:
        """Return the keys of the header."""
        types = gguf_package().GGUFValueType
        found = [
            Field("tokenizer.ggml.model", self.model),
            Field("tokenizer.ggml.pre", self.pre),
            Field("tokenizer.ggml.tokens", self.tokens),
            Field("tokenizer.ggml.token_type", self.types, types.ARRAY, types.INT32),
            *(Field(f"tokenizer.ggml.{name}_token_id", number) for name, number in self.special.items()),
            Field("tokenizer.ggml.add_bos_token", self.adds_bos),
            Field("tokenizer.ggml.add_eos_token", self.adds_eos),
        ]
        if self.scores is not None:
            found.append(Field("tokenizer.ggml.scores", self.scores, types.ARRAY, types.FLOAT32))
            found.append(Field("tokenizer.ggml.add_space_prefix", self.adds_space))
        # An array cannot be empty; without the key there are no merges.
        if self.merges:
            found.append(Field("tokenizer.ggml.merges", self.merges))
        return found + _template_fields(chat_template)


def read_vocabulary(reader: Any) -> Vocabulary:
    """Read the vocabulary back from the header of a file."""
    key = "tokenizer.ggml."
    return Vocabulary(
        model=contents(reader, f"{key}model"),
        pre=contents(reader, f"{key}pre"),
        tokens=contents(reader, f"{key}tokens"),
        types=contents(reader, f"{key}token_type"),
        scores=contents(reader, f"{key}scores"),
        merges=contents(reader, f"{key}merges"),
        special={name: n for name in SPECIAL if (n := contents(reader, f"{key}{name}_token_id")) is not None},
        adds_bos=contents(reader, f"{key}add_bos_token"),
        adds_eos=contents(reader, f"{key}add_eos_token"),
        adds_space=contents(reader, f"{key}add_space_prefix", False),
    )


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer, with an UNUSED token for every row that has no token.

    Its `pre` is empty for byte-level BPE: `gguf_token_ids.choose_pre` finds it.

    Raises:
        ConfigError: a slow tokenizer, another kind than BPE, or more tokens than the embedding has rows.
    """
    description = _description(tokenizer)
    model = description["model"]
    is_bytes = _has(description, "pre_tokenizer", "ByteLevel")
    is_pieces = bool(model.get("byte_fallback")) or _has_space_marks(description)
    kind = model.get("type")
    remedy = "llama.cpp's BPE vocabularies alone are written here; convert with its own script, and add the factors"
    require(kind == "BPE" and is_bytes != is_pieces, "tokenizer", kind, remedy)
    _warn(description)
    tokens, types = _tokens(description, vocab_size, is_pieces)
    plain = Vocabulary(
        model=SENTENCE_PIECE if is_pieces else BPE,
        pre="default" if is_pieces else "",
        tokens=tokens,
        types=types,
        scores=None,
        merges=None,
        special=_special(tokenizer),
        adds_bos=_adds(tokenizer, 0, tokenizer.bos_token_id),
        adds_eos=_adds(tokenizer, -1, tokenizer.eos_token_id),
        adds_space=is_pieces and _adds_space(description),
    )
    merges = [each if isinstance(each, list) else each.split(" ", 1) for each in model["merges"]]
    if is_pieces:
        return replace(plain, scores=_scores(tokens, merges))
    return replace(plain, merges=[" ".join(pair) for pair in merges])


def _description(tokenizer: Tokenizer) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("tokenizer", type(tokenizer).__name__, "has no tokenizer.json; save its fast version")
    description: dict[str, Any] = parse_json(backend.to_str().encode(), Path("tokenizer.json"))
    return description


def _tokens(description: Mapping[str, Any], vocab_size: int, is_pieces: bool) -> tuple[list[str], list[int]]:
    """Return text and type of every row of the embedding."""
    model = description["model"]
    known: dict[int, tuple[str, int]] = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    if is_pieces:
        known |= {n: (text, BYTE) for n, (text, _) in known.items() if _is_byte(text)}
        known |= {n: (text, UNKNOWN) for n, (text, _) in known.items() if text == model.get("unk_token")}
    for added in description["added_tokens"]:
        if is_pieces and known.get(added["id"], ("", NORMAL))[1] == UNKNOWN:
            continue
        # llama.cpp looks for added tokens in the text as it was typed, before spaces become marks.
        text = added["content"].replace(SPACE, " ") if is_pieces else added["content"]
        known[added["id"]] = text, CONTROL if added["special"] else USER_DEFINED
    remedy = f"the embedding has {vocab_size} rows; give the tokenizer that the model was trained with"
    require(max(known) < vocab_size, "tokenizer", f"{max(known) + 1} ids", remedy)
    taken = {text for text, _ in known.values()}
    require(len(taken) == len(known), "tokenizer", None, "two of its tokens have the same text, which GGUF cannot say")
    rows = [known.get(number) or (_unused(number, taken), UNUSED) for number in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _unused(number: int, taken: set[str]) -> str:
    """Return a name for a row without a token; every token of a file needs its own."""
    name = f"[PAD{number}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores by which merging the best pair first is merging by rank.

    llama.cpp looks at the score of the merged token, `tokenizers` at the rank of the pair.
    """
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank[token]) - 1.0 if token in rank else NEVER_MERGED for token in tokens]


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{own}_token_id", None) for name, own in names.items()}
    return {name: int(number) for name, number in found.items() if number is not None}


def _adds(tokenizer: Tokenizer, place: int, number: int | None) -> bool:
    """Return True if the tokenizer puts the token `number` at an end of a text."""
    ids = tokenizer("a")["input_ids"]
    return number is not None and bool(ids) and ids[place] == number


def _adds_space(description: Mapping[str, Any]) -> bool:
    for name in ("normalizer", "pre_tokenizer"):
        for step in _steps(description.get(name)):
            if step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always"):
                return True
    return False


def _has_space_marks(description: Mapping[str, Any]) -> bool:
    replaced = any(step.get("content") == SPACE for step in _steps(description.get("normalizer")))
    return replaced or _has(description, "pre_tokenizer", "Metaspace")


def _has(description: Mapping[str, Any], part: str, name: str) -> bool:
    return any(step["type"] == name for step in _steps(description.get(part)))


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is None:
        return []
    nested = part.get("normalizers") or part.get("pretokenizers")
    return [step for each in nested for step in _steps(each)] if nested else [part]


def _warn(description: Mapping[str, Any]) -> None:
    """Say what llama.cpp leaves out and the verification therefore cannot ask for."""
    if _has(description, "normalizer", "NFC"):
        logger.warning("the tokenizer composes accents (NFC) and llama.cpp does not: give it composed text")
    strips = [each["content"] for each in description["added_tokens"] if each["lstrip"] or each["rstrip"]]
    if strips:
        logger.warning(
            "transformers drops spaces beside %d special tokens (%s), and llama.cpp keeps them: write none there",
            len(strips),
            ", ".join(strips[:3]),
        )


def _template_fields(template: str | Mapping[str, str] | None) -> list[Field]:
    """Return the chat template, or several by name, of which `default` is the one that llama.cpp uses."""
    key = "tokenizer.chat_template"
    if template is None or isinstance(template, str):
        return [] if template is None else [Field(key, template)]
    others = {name: text for name, text in template.items() if name != "default"}
    found = [Field(f"{key}.{name}", text) for name, text in others.items()]
    found += [Field(f"{key}s", list(others))] if others else []
    return found + ([Field(key, template["default"])] if "default" in template else [])
