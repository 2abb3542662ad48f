"""Small models and references shared by the tests of scaling methods."""

import torch
from transformers import LlamaConfig, PreTrainedModel

L = 32


def plain(num_pairs: int, base: float = 10000.0) -> list[float]:
    """Compute the frequencies of plain RoPE, one pair at a time."""
    return [base ** (-j / num_pairs) for j in range(num_pairs)]


def llama(num_pairs: int = 8) -> LlamaConfig:
    """Configure a Llama of two layers and two heads of `num_pairs` pairs."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=4 * num_pairs,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=L,
    )


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Set weights with which attention depends on positions, unlike with fresh ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=generator)
    return model.double().eval()
