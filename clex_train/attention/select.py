"""Choice of the attention implementation: what `attention.implementation=auto` resolves to, and SDPA's kernel.

`auto` is flash-attn where it is installed and supports the model, else scaled_dot_product_attention (SDPA). Families
that SDPA cannot compute fall to transformers' explicit attention (`eager`).
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from clex_train.config.attention import MAX_FLASH_HEAD_DIM, AttentionConfig, AttentionImplementation
from clex_train.utils.errors import require
from clex_train.utils.versions import install_command

SDPA_KERNELS = {0: "explicit", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
"""Kernel names by the numbers of torch.nn.attention.SDPBackend."""
# Long enough to find the kernel, and short enough that a mask [S, S] is cheap.
MAX_PROBE_TOKENS = 1024
ULYSSES = "ulysses"
"""Name under which `attention.ulysses` registers itself with transformers."""


def check_attention(implementation: AttentionImplementation, key: str = "attention.implementation") -> None:
    """Raise `ConfigError` for a back end that this machine lacks; `key` is the user's key for it."""
    require(
        implementation is not AttentionImplementation.flash_attention_2 or is_flash_attn_2_available(),
        key,
        implementation.name,
        f"flash-attn is not installed or there is no GPU: {install_command('gpu')}, or use sdpa",
    )


def resolve_attention(requested: AttentionConfig, arch: PretrainedConfig, dtype: torch.dtype) -> AttentionConfig:
    """Replace `auto` in `requested` by an implementation."""
    return replace(requested, implementation=choose_implementation(requested, arch, dtype))


def choose_implementation(
    requested: AttentionConfig, arch: PretrainedConfig, dtype: torch.dtype
) -> AttentionImplementation:
    """Choose the implementation for a model of this architecture, computed in `dtype` on this machine.

    Raises:
        ConfigError: `sdpa` is requested and cannot compute the model.
    """
    if requested.implementation is not AttentionImplementation.auto:
        if requested.implementation is AttentionImplementation.sdpa:
            require(
                supports_sdpa(arch), "attention.implementation", "sdpa", f"not for {arch.model_type}; use auto or eager"
            )
        return requested.implementation
    # LM-Infinite replaces the attention function, so flash-attn would go unused.
    if not requested.lambda_mask and flash_unsupported_reason(arch, dtype) is None:
        return AttentionImplementation.flash_attention_2
    return AttentionImplementation.sdpa if supports_sdpa(arch) else AttentionImplementation.eager


def supports_sdpa(arch: PretrainedConfig) -> bool:
    """Return True if SDPA computes the model's attention correctly, as far as is known."""
    # SDPA has no logit cap. transformers before 5.21 still offers it for Gemma 2 and drops the cap without an error.
    capped = getattr(arch.get_text_config(), "attn_logit_softcapping", None) is not None
    return not capped and all(getattr(each, "_supports_sdpa", True) for each in _model_classes(arch))


def flash_unsupported_reason(arch: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Explain why flash-attn cannot compute the model's attention; None if it can."""
    if not is_flash_attn_2_available():
        return "flash-attn is not installed, or there is no GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn supports float16 and bfloat16, not {_name(dtype)}"
    if not _supports_flash(arch):
        return f"model_type={arch.model_type} has no flash attention"
    if head_dim(arch) > MAX_FLASH_HEAD_DIM:
        return f"flash-attn supports head dims up to {MAX_FLASH_HEAD_DIM}, the model has {head_dim(arch)}"
    return None


def sdpa_kernel(
    arch: PretrainedConfig, num_tokens: int, dtype: torch.dtype, device: torch.device, masked: bool = False
) -> str:
    """Name the kernel that SDPA picks on `device` for training rows of `num_tokens`.

    `masked` means under a mask [S, S] instead of the causal flag.
    """
    tokens = min(num_tokens, MAX_PROBE_TOKENS)
    heads = arch.get_text_config().num_attention_heads
    # Some kernels support inference only, so the query must require a gradient as in training.
    query = torch.empty(1, heads, tokens, head_dim(arch), dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril() if masked else None
    # Private, but the only way to find out without running the kernel (`utils.private_names`).
    number = torch._fused_sdp_choice(query, query, query, mask, 0.0, not masked)
    return SDPA_KERNELS.get(number, f"number {number}")


def describe(
    implementation: AttentionImplementation,
    arch: PretrainedConfig,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    masked: bool = False,
) -> str:
    """Describe the attention computation for the log."""
    where = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = implementation.value
    if implementation is AttentionImplementation.sdpa:
        name = f"sdpa, its {sdpa_kernel(arch, num_tokens, dtype, device, masked)} kernel,"
    return f"{name} in {_name(dtype)} on {where}"


def head_dim(arch: PretrainedConfig) -> int:
    """Return the number of components of a head."""
    shape = arch.get_text_config()
    width: int = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return width


def _supports_flash(arch: PretrainedConfig) -> bool:
    """Return True if all of the architecture's model classes declare flash attention."""
    families = _model_classes(arch)
    # Code that comes with a model is not inspected, and so not trusted to support it.
    return bool(families) and all(getattr(each, "_supports_flash_attn", False) for each in families)


def _model_classes(arch: PretrainedConfig) -> tuple[Any, ...]:
    """Return transformers' classes for the architecture; empty if its code comes with the model."""
    # A mapped entry is a class, or a tuple of classes for models that share a config.
    family = AutoModelForCausalLM._model_mapping.get(type(arch), ())
    return tuple(family) if isinstance(family, (tuple, list)) else (family,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
