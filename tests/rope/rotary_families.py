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

_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": CONTEXT // 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "partial_rotary_factor": 0.5,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

QUERIES_AND_KEYS = ("q_proj", "k_proj", "query_key_value", "qkv_proj", "q_b_proj", "kv_a_proj")
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
    "olmo3": {"num_key_value_heads": 2, **_MIXED},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **_MIXED,
    },
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "use_sliding_window": False},
    "exaone4": {"num_key_value_heads": 2, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "ministral3": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": CONTEXT,
        },
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        **_EXPERTS,
        **_LINEAR,
    },
    "qwen3_5_text": {"num_key_value_heads": 2, "head_dim": 16, **_LINEAR},
    "deepseek_v2": {"topk_method": "greedy", **_LATENT},
    "deepseek_v3": _LATENT,
}
# Facts that the tests state by themselves, independently of what the product finds.
KEPT: dict[str, set[int]] = {"gpt_oss": {0}, "smollm3": {1}}
"""Layers with the model's own RoPE, or none, in families where one module serves all layers."""
INTERLEAVED = {"cohere", "deepseek_v2"}
LATENT = {"deepseek_v2", "deepseek_v3"}
"""Families that cache the rotated part of keys as values."""
UNEXPORTED = {
    "gpt_oss": "layers 0 see at most L tokens and keep the base's frequencies, but share one RoPE",
    "ministral3": "reads original_max_position_embeddings for a temperature by position",
}
"""Families that no config.json expresses at one t, with the reason."""
EXPORTED = [family for family in FAMILIES if family not in UNEXPORTED]
UNFOLDED = {"falcon", "deepseek_v2", "deepseek_v3"}
"""Families whose queries take no constant of log-scaling."""
WITHOUT_LM_INFINITE = {"gpt_oss", "smollm3", "qwen3_next", "qwen3_5_text", "deepseek_v2", "deepseek_v3"}
"""Families with learned sinks, layers without RoPE, a recurrent state or latent attention."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 4": (
        "llama4_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": CONTEXT // 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "every layer with RoPE sees a window of 8 tokens, at most L = 16, and layers with full attention have no pos",
    ),
    "Command A, Command R7B": (
        "cohere2",
        {"num_key_value_heads": 2, **_MIXED},
        "every layer with RoPE sees a window of 8 tokens, at most L = 16, and layers with full attention have no pos",
    ),
    "EXAONE 4 32B": (
        "exaone4",
        {"num_key_value_heads": 2, **_MIXED},
        "every layer with RoPE sees a window of 8 tokens, at most L = 16, and layers with full attention have no pos",
    ),
    "Gemma 4": (
        "gemma4_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            **_MIXED,
        },
        "6 of its 8 frequencies are 0",
    ),
    "Mistral 4": ("mistral4", _LATENT, "transformers has none for it under AutoModelForCausalLM"),
}
"""Families of today that CLEX cannot extend: model_type, settings of a small model, part of the reason."""
ONE_ATTENTION: dict[str, dict[str, Any]] = {
    **{
        family: {"layer_types": ["full_attention"]}
        for family in ("gemma2", "gemma3_text", "olmo3", "gpt_oss", "exaone4")
    },
    **{name: {"num_hidden_layers": 2} for name in ("qwen3_next", "qwen3_5_text")},
    "smollm3": {"no_rope_layers": [1]},
}
"""Settings for a model with a single layer of full attention that rotates."""


def tiny_model(
    family: str, num_layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a model of `family` in evaluation mode, with seeded weights large enough for attention to matter."""
    settings = {"num_hidden_layers": num_layers, **FAMILIES[family], **overrides}
    torch.manual_seed(seed)
    model = from_config(tiny_config(family, settings)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(each in name for each in QUERIES_AND_KEYS):
                parameter.mul_(8)
    return model


def tiny_config(model_type: str, settings: dict[str, Any]) -> PretrainedConfig:
    """Return the config of a small model."""
    config: PretrainedConfig = AutoConfig.for_model(model_type, **{**_COMMON, **settings})
    return config


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
