"""Count a model's parameters and the weights in its matrix products, also where ZeRO-3 shards them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def matmul_shape(model: PreTrainedModel) -> tuple[float, int, int, int]:
    """Return (weights in a token's matrix products, layers, heads, head dim) for the MFU, sharded or not.

    Frozen weights count as two thirds.
    """
    # The input embedding is a look-up and costs no FLOPs, unless the output layer shares it. Of the experts, a token
    # visits a few.
    shape: Any = model.config.get_text_config()
    visited = getattr(shape, "num_experts_per_tok", 1) / max(1, getattr(shape, "num_local_experts", None) or 1)
    visits = 0.0
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 a parameter is empty between gathers; `ds_numel` has its real size.
        size = getattr(parameter, "ds_numel", parameter.numel())
        # A frozen weight costs no product for its own gradient: 4 FLOPs instead of 6.
        size *= 1.0 if parameter.requires_grad else 2 / 3
        visits += size * (visited if ".experts." in name else 1.0)
    if not getattr(shape, "tie_word_embeddings", False):
        embedding: Any = model.get_input_embeddings().weight
        visits -= getattr(embedding, "ds_numel", embedding.numel()) * (1.0 if embedding.requires_grad else 2 / 3)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return visits, shape.num_hidden_layers, shape.num_attention_heads, head_dim


def num_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, sharded or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def num_trained(module: nn.Module) -> int:
    """Count the parameters of a module that are not frozen, sharded or not."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
