"""Model families in llama.cpp's terms: which are written as what, and why others are refused.

llama.cpp knows an architecture by name and passes RoPE factors in some of them only (src/models/*.cpp of its release
v0.4.0). `llama` reads Llama, Mistral, Mixtral, and Qwen2, whose biases of q, k and v it accepts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from clex_train.gguf.files import Field
from clex_train.utils.errors import ConfigError, require

WRITTEN = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "llama", "phi3": "phi3"}
"""llama.cpp's architecture of each model type that is written."""

IGNORING = {
    "cohere": "command-r",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""Architecture of model types whose RoPE gets no factors in llama.cpp."""

ADDABLE = ("llama", "phi3", "apertus", "arcee", "deci", "exaone", "granite", "mistral3")
"""Architectures whose loader asks for the tensor and whose every rotary layer uses it, so that a file can get one."""

INSTEAD = "use format=huggingface or format=vllm"


@dataclass(frozen=True)
class Form:
    """Dimensions of a model in llama.cpp's terms."""

    architecture: str
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_rotated: int
    """Rotated dimensions of a head, two per factor."""
    vocab_size: int
    num_experts: int
    num_used_experts: int
    norm_eps: float
    rope_theta: float
    tied: bool

    def fields(self, served_len: int, attention_factor: float) -> list[Field]:
        """Return the keys of the header that describe the model, for contexts of `served_len` tokens."""
        keys: dict[str, int | float] = {
            "vocab_size": self.vocab_size,
            "context_length": served_len,
            "embedding_length": self.width,
            "block_count": self.num_layers,
            "feed_forward_length": self.mlp_width,
            "attention.head_count": self.num_heads,
            "attention.head_count_kv": self.num_kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.norm_eps,
            "rope.dimension_count": self.num_rotated,
            "rope.freq_base": self.rope_theta,
        }
        if self.num_experts:
            keys |= {"expert_count": self.num_experts, "expert_used_count": self.num_used_experts}
        if self.architecture == "phi3":
            # The loader wants the key; 0 says that no layer has a window.
            keys |= {"rope.scaling.original_context_length": served_len, "attention.sliding_window": 0}
        return [
            *(Field(f"{self.architecture}.{key}", value) for key, value in keys.items()),
            *scaling_fields(self.architecture, attention_factor),
        ]


def scaling_fields(architecture: str, attention_factor: float) -> list[Field]:
    """Return the factor of cos and sin, which phi3 needs in any case and others where it is not 1."""
    if architecture != "phi3" and attention_factor == 1.0:
        return []
    return [Field(f"{architecture}.rope.scaling.attn_factor", float(attention_factor))]


def form_of(config: PretrainedConfig, served_len: int) -> Form:
    """Return the form in which a model is written.

    Raises:
        ConfigError: llama.cpp ignores factors in this family, or computes another model from it.
    """
    architecture = architecture_of(config.model_type)
    _require_same_mathematics(config, served_len)
    rope = config.rope_parameters or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    form = Form(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        num_rotated=int(head_dim * _partial(rope)),
        vocab_size=config.vocab_size,
        num_experts=getattr(config, "num_local_experts", 0),
        num_used_experts=getattr(config, "num_experts_per_tok", 0),
        norm_eps=float(config.rms_norm_eps),
        rope_theta=float(rope["rope_theta"]),
        tied=bool(config.tie_word_embeddings),
    )
    _require_heads(form)
    return form


def architecture_of(model_type: str) -> str:
    """Return llama.cpp's architecture of a model type; `ConfigError` for one that is not written, with the reason."""
    if model_type in WRITTEN:
        return WRITTEN[model_type]
    if model_type in IGNORING:
        raise ConfigError("format", "gguf", _ignored(IGNORING[model_type]))
    raise ConfigError(
        "format",
        "gguf",
        f"the family {model_type} is not written; convert the plain model with llama.cpp's convert_hf_to_gguf.py and "
        f"add the factors to that file, or {INSTEAD}",
    )


def require_addable(base: Path, architecture: str) -> None:
    """Raise `ConfigError` for a GGUF file whose architecture uses no factors, or is not known to."""
    if architecture in (*IGNORING.values(), "qwen2"):
        raise ConfigError("base_gguf", base, _ignored(architecture))
    remedy = f"architecture {architecture}; factors are added to {', '.join(ADDABLE)}"
    require(architecture in ADDABLE, "base_gguf", base, remedy)


def _ignored(architecture: str) -> str:
    return f"llama.cpp gives no factors to RoPE in {architecture}, and refuses a file that has them; {INSTEAD}"


def _partial(rope: Mapping[str, Any]) -> float:
    return float(rope.get("partial_rotary_factor") or 1.0)


def _require_same_mathematics(config: PretrainedConfig, served_len: int) -> None:
    """Refuse settings that llama.cpp's graph of the architecture does not have."""
    require(config.hidden_act == "silu", "hidden_act", config.hidden_act, f"llama.cpp computes silu here; {INSTEAD}")
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    # Families with `layer_types` set a window that no layer may use; the others use it in every layer.
    is_used = "sliding_attention" in layers if layers else bool(window)
    remedy = f"llama.cpp attends to all {served_len:,} tokens in this architecture, not to a window; {INSTEAD}"
    require(not is_used or int(window or 0) >= served_len, "sliding_window", window, remedy)


def _require_heads(form: Form) -> None:
    partial = form.num_rotated != form.head_dim
    remedy = f"llama.cpp's architecture llama rotates whole heads; {INSTEAD}"
    require(not (partial and form.architecture == "llama"), "partial_rotary_factor", form.num_rotated, remedy)
    whole = form.num_heads * form.head_dim == form.width
    remedy = f"llama.cpp's architecture phi3 has heads of hidden_size / num_attention_heads; {INSTEAD}"
    require(whole or form.architecture != "phi3", "head_dim", form.head_dim, remedy)
