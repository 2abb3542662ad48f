"""Small random models of the families with rotary embeddings, for tests."""

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from clex_train.attention.select import supports_sdpa

VOCABULARY, CONTEXT = 61, 16
TRANSFORMERS = Version(transformers.__version__)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2_moe": {"num_key_value_heads": 2, "shared_expert_intermediate_size": 32, **_EXPERTS},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 1024, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": CONTEXT, "sliding_window": None},
    "stablelm": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "falcon": {"ffn_hidden_size": 64, "alibi": False, "num_kv_heads": 4, "new_decoder_architecture": True},
    "olmo": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": None},
}


def tiny_model(
    family: str, num_layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a model of `family` in evaluation mode, with seeded weights large enough for attention to matter."""
    settings = {**_COMMON, "num_hidden_layers": num_layers, **FAMILIES[family], **overrides}
    torch.manual_seed(seed)
    model = from_config(AutoConfig.for_model(family, **settings)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "query_key_value" in name or "qkv_proj" in name:
                parameter.mul_(8)
    return model


def from_config(arch: PretrainedConfig) -> PreTrainedModel:
    """Build a model with random weights and the family's attention.

    transformers before 5.21 offers SDPA for Gemma 2 and drops its cap.
    """
    named = {} if supports_sdpa(arch) else {"attn_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(arch, **named)
    return model


def tokens(num_rows: int, num_tokens: int, seed: int = 1) -> torch.Tensor:
    """Draw random token ids [B, S], without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (num_rows, num_tokens), generator=generator)
