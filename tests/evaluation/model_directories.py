"""Inputs of the evaluation programs: a stock model, one with CLEX, and a token store for both."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clex_train.models.directory import write_clex
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Save a tokenizer whose words are the numbers below `vocab_size`."""
    vocabulary = {str(i): i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", unk_token="1").save_pretrained(folder)


def save_model(folder: Path) -> None:
    """Save the tiny Llama with its tokenizer."""
    build_tiny_llama().save_pretrained(folder)
    save_tokenizer(folder, VOCAB)


def save_clex_model(folder: Path, t_max: float = 4.0) -> None:
    """Save the same model with a vector field that changes the frequencies visibly."""
    save_model(folder)
    inv_freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    clex = Clex(inv_freq, t_max=t_max, seed=0)
    torch.nn.init.normal_(clex.down, std=0.5, generator=torch.Generator().manual_seed(1))
    write_clex(folder, clex, clex.table(scale_grid(int(t_max))), CONTEXT_LEN)


def save_store(folder: Path, vocab_size: int = VOCAB) -> None:
    """Write three documents of 70, 20 and 200 random tokens in both splits."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 90, (n,), generator=generator).tolist() for n in (70, 20, 200)]
    write_store(folder, {"train": documents, "validation": documents}, vocab_size)
    save_tokenizer(folder / "tokenizer", vocab_size)
