"""Tokenizers of the two usual kinds, trained on sources of the standard library."""

import json
import os
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LIBRARY = Path(os.__file__).parent
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("email/*.py"))]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Train byte-level BPE as in GPT-2 and Llama 3: no normalisation, spaces in front of words, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Train BPE as in Llama 2: spaces are visible marks, one in front, with byte fallback and a BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fall_back = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *fall_back],
        max_token_length=12,
        show_progress=False,
    )
    # Split at words, because merges across words would make a few tokens of a repeated sentence.
    words = [word for text in TEXTS for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = json.loads(tokenizer.to_str())
    # The trainer marks byte tokens as special, and decoding would skip them.
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in fall_back]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
