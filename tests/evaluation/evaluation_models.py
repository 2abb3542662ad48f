"""A tiny Llama with weights large enough for every position to matter, and windows of random tokens for it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clex_train.evaluation.windows import WindowSet

CONTEXT_LEN = 16
VOCAB = 97


def build_tiny_llama() -> LlamaForCausalLM:
    """Build a tiny Llama with the same weights at every call."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LEN,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_windows(count: int, longest: int) -> WindowSet:
    """Draw windows of random tokens, each from a separate document."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, (count, longest))
    return WindowSet(tokens, np.arange(count), np.zeros(count, dtype=np.int64))
