"""Small tokenizers of the published kinds, made from one byte-level BPE, as dicts of `tokenizer.json`."""

import copy
import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FEW = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{FEW}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{FEW}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    """Return a pre-tokenizer of the Llama 3 kind."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTES_ONLY]}


def learn(texts: Iterable[str], vocab_size: int = 1500) -> dict[str, Any]:
    """Train a byte-level BPE with `<pad> <s> </s>` at 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return dict(json.loads(tokenizer.to_str()))


def with_parts(base: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Copy a tokenizer with some parts replaced, such as pre_tokenizer=... or normalizer=..."""
    return copy.deepcopy(base) | parts


def byte_level_variants(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by name the variants that gigatoken supports."""
    return {
        "gpt2": base,
        "gpt2, NFC": with_parts(base, normalizer={"type": "NFC"}),
        "llama3": with_parts(base, pre_tokenizer=split(LLAMA3)),
        "qwen2": with_parts(base, pre_tokenizer=split(QWEN2), normalizer={"type": "NFC"}),
        "o200k": with_parts(base, pre_tokenizer=split(O200K)),
    }


def sentencepiece(texts: Iterable[str], **parts: Any) -> dict[str, Any]:
    """Train the Llama 2 kind: spaces are U+2581, one in front, no pre-tokenizer, byte fallback."""
    texts = list(texts)
    # The trainer's own limit breaks ties between equally frequent characters differently in each process.
    counts = Counter("".join(texts))
    known = set(sorted(counts, key=lambda character: (-counts[character], character))[:80])
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(("".join(filter(known.__contains__, text)) for text in texts), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    content["pre_tokenizer"] = None
    return dict(content) | parts


@lru_cache(maxsize=1)
def metaspace() -> dict[str, Any]:
    """Return the pre-tokenizer of newer Llama 2 files."""
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
