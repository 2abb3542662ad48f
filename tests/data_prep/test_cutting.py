"""Cutting long texts for tokenization: the joined ids of the pieces equal the ids of the whole text."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.tokenize import cutting
from data_prep.tokenize.cutting import Uncuttable, cutter
from data_prep.tokenize.engines import GigatokenEngine, TokenizersEngine
from tests.data_prep.small_corpora import TEXTS
from tests.data_prep.tokenizer_variants import byte_level_variants, learn, metaspace, sentencepiece, split, with_parts

CORPUS = [Path(__file__).read_text(encoding="utf-8"), *TEXTS] * 3
PARTS = ["a", "b c", " d", "the", "It's", " ", "  ", "\n", "\n\n", "\r\n", ".", "。", "!\n", "/", "x\n/y", "1", "23"]
PARTS += ["\t", "\x1c", "\x85", "\u3000", "é", "e\u0301", "橋", "🌉", "</s>", "_", "\u2581", "Ġ", "Ċ", "'ll", "\ufb01"]


def variants() -> dict[str, dict[str, Any]]:
    """Return every kind of tokenizer for which cutting is proven exact."""
    base, words = learn(CORPUS), sentencepiece(CORPUS)
    digits = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, base["pre_tokenizer"]],
    }
    return byte_level_variants(base) | {
        "digits": with_parts(base, pre_tokenizer=digits),
        "prefix space": with_parts(base, pre_tokenizer=base["pre_tokenizer"] | {"add_prefix_space": True}),
        "NFD": with_parts(base, normalizer={"type": "NFD"}),
        "llama2": words,
        "metaspace": words | {"normalizer": None, "pre_tokenizer": metaspace()},
    }


@pytest.mark.parametrize("name", sorted(variants()))
def test_joined_ids_of_pieces_equal_those_of_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_CHARS", 2)
    content = json.dumps(variants()[name])
    cut, engine, generator = cutter(content), TokenizersEngine(content), random.Random(0)
    texts = ["".join(generator.choices(PARTS, k=40)) for _ in range(1500)] + TEXTS + [CORPUS[0]]
    num_pieces = 0
    for text in texts:
        pieces = list(cut(text))
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
        joined = np.concatenate(engine.encode([piece for piece, _ in pieces]))
        assert joined.tolist() == engine.encode([text])[0].tolist(), repr(text)
        num_pieces += len(pieces)
    assert num_pieces > 2 * len(texts), "texts are cut"


def test_a_piece_exceeds_the_given_length_by_at_most_a_word() -> None:
    cut = cutter(json.dumps(learn(CORPUS)))
    lengths = [len(piece) for piece, _ in cut("some words of text " * 100_000)]
    assert len(lengths) > 100
    assert max(lengths) < cutting.PIECE_CHARS + 20
    assert sum(lengths) == 1_900_000


def test_text_without_white_space_is_one_piece() -> None:
    cut = cutter(json.dumps(learn(CORPUS)))
    assert list(cut("x" * 100_000)) == [("x" * 100_000, True)]
    lines = "橋を渡る。\n" * 20_000
    assert len(list(cut(lines))) > 5, "lines are places, too"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": split(r"\w+|(?<=a) b|\s+")}, r"pre-tokenizer Split"),
        ({"model": {"type": "Unigram", "vocab": []}}, "model is Unigram"),
        ({"added_tokens": [{"content": "two words", "special": False}]}, "'two words' may span a cut"),
        ({"added_tokens": [{"content": "x", "rstrip": True, "special": False}]}, "absorbs white space"),
    ],
)
def test_a_tokenizer_without_provable_cuts_is_refused(parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(Uncuttable, match=reason):
        cutter(json.dumps(with_parts(learn(CORPUS), **parts)))


def test_a_vocabulary_with_multi_word_tokens_is_refused() -> None:
    content = sentencepiece(CORPUS)
    content["model"]["vocab"]["of\u2581the"] = 5000
    with pytest.raises(Uncuttable, match="tokens of several words"):
        cutter(json.dumps(content))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama2"])
def test_both_engines_give_the_same_ids_for_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(cutting, "PIECE_CHARS", 50)
    content = json.dumps(variants()[name])
    pieces = [piece for text in CORPUS for piece, _ in cutter(content)(text)]
    for ours, theirs in zip(
        GigatokenEngine(content).encode(pieces), TokenizersEngine(content).encode(pieces), strict=True
    ):
        assert ours.tolist() == theirs.tolist()
