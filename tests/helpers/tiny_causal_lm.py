"""A Llama of a few thousand parameters with a tokenizer of digits, saved as a user would save a model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 61, 16


def tiny_llama(**settings: object) -> LlamaForCausalLM:
    """Build a Llama with L = 16 and 6 pairs per head, with weights large enough for attention to matter."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **{**sizes, **settings},
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def save_tiny_llama(folder: Path) -> LlamaForCausalLM:
    """Save model and tokenizer in one directory."""
    model = tiny_llama()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="1", pad_token="0").save_pretrained(folder)
    return model
