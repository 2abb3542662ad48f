"""Fixtures of the tests of data_prep: a small byte-level tokenizer, with and without BOS."""

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data_prep import train_tokenizer
from data_prep.config import CorpusConfig, TrainTokenizerVerb
from tests.data_prep.small_corpora import TEXTS


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer of 400 tokens with `<pad> <s> </s>` at 0, 1, 2."""
    config = TrainTokenizerVerb(corpus=CorpusConfig(), vocab_size=400, model_max_length=512)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer.train(iter(TEXTS * 3), config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bos_tokenizer_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tokenizer with a BOS in front of every text, as Llama and Gemma have."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "bos"
    tokenizer.save_pretrained(path)
    return path
