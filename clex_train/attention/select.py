"""Which attention a run computes with: what `attention.implementation=auto` stands for, and the kernel's name.

flash-attn where it is installed and can compute the model, else scaled_dot_product_attention, which itself takes
cuDNN's, a flash, a memory-efficient or an explicit kernel, whichever can compute the call and is first in its order;
the explicit sum of transformers (`eager`) for families that SDPA cannot compute.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from clex_train.config.attention import AttentionConfig, AttentionImplementation
from clex_train.utils.bounds import require

SDPA_KERNELS = {0: "explicit", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
"""By torch.nn.attention.SDPBackend's numbers."""
MAX_PROBE_TOKENS = 1024
MAX_FLASH_HEAD_DIM = 256


def resolve_attention(requested: AttentionConfig, arch: PretrainedConfig, dtype: torch.dtype) -> AttentionConfig:
    """`requested` with a back end of transformers in the place of `auto`."""
    return replace(requested, implementation=choose_implementation(requested, arch, dtype))


def choose_implementation(
    requested: AttentionConfig, arch: PretrainedConfig, dtype: torch.dtype
) -> AttentionImplementation:
    """The back end of transformers for a model of this architecture, computed in `dtype` on this machine.

    Raises `ValueError` where `sdpa` is requested for and cannot compute the model.
    """
    if requested.implementation is not AttentionImplementation.auto:
        if requested.implementation is AttentionImplementation.sdpa:
            require(
                supports_sdpa(arch), "attention.implementation", "sdpa", f"not for {arch.model_type}; use auto or eager"
            )
        return requested.implementation
    if not requested.lambda_mask and flash_unsupported_reason(arch, dtype) is None:
        return AttentionImplementation.flash_attention_2
    return AttentionImplementation.sdpa if supports_sdpa(arch) else AttentionImplementation.eager


def supports_sdpa(arch: PretrainedConfig) -> bool:
    """Whether SDPA computes the model's attention, as far as is known.

    It has no cap of attention logits. transformers before 5.21 offers it for Gemma 2 all the same and leaves out the
    cap, which changes the logits without an error.
    """
    capped = getattr(arch.get_text_config(), "attn_logit_softcapping", None) is not None
    return not capped and all(getattr(each, "_supports_sdpa", True) for each in _model_classes(arch))


def flash_unsupported_reason(arch: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot compute the attention of the model; None if it can."""
    if not is_flash_attn_2_available():
        return "flash-attn is not installed, or there is no GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in bfloat16, not in {_name(dtype)}"
    if not _supports_flash(arch):
        return f"model_type={arch.model_type} has no flash attention"
    if head_dim(arch) > MAX_FLASH_HEAD_DIM:
        return f"flash-attn has heads of at most {MAX_FLASH_HEAD_DIM} components, the model {head_dim(arch)}"
    return None


def sdpa_kernel(
    arch: PretrainedConfig, num_tokens: int, dtype: torch.dtype, device: torch.device, masked: bool = False
) -> str:
    """The kernel that SDPA takes on `device` for training rows of `num_tokens`; `masked`: under a mask [S, S]."""
    tokens = min(num_tokens, MAX_PROBE_TOKENS)
    heads = arch.get_text_config().num_attention_heads
    query = torch.empty(1, heads, tokens, head_dim(arch), dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril() if masked else None
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
    """What computes attention, for the log."""
    where = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = implementation.value
    if implementation is AttentionImplementation.sdpa:
        name = f"sdpa, its {sdpa_kernel(arch, num_tokens, dtype, device, masked)} kernel,"
    return f"{name} in {_name(dtype)} on {where}"


def head_dim(arch: PretrainedConfig) -> int:
    """Components of a head."""
    shape = arch.get_text_config()
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def _supports_flash(arch: PretrainedConfig) -> bool:
    """Code that comes with a model is not looked at, and so not trusted to have it."""
    families = _model_classes(arch)
    return bool(families) and all(getattr(each, "_supports_flash_attn", False) for each in families)


def _model_classes(arch: PretrainedConfig) -> tuple[Any, ...]:
    """Classes of transformers for the architecture; none for one whose code comes with the model."""
    family = AutoModelForCausalLM._model_mapping.get(type(arch), ())
    return tuple(family) if isinstance(family, (tuple, list)) else (family,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
