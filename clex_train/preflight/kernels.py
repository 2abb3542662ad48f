"""Choice of the kernels of a run: attention back end and Liger.

Everything runs without the optional packages, only slower on a GPU.
"""

import dataclasses

import torch
from torch import nn
from transformers import PretrainedConfig

from clex_train.attention import select
from clex_train.config.attention import AttentionImplementation
from clex_train.config.engine import Liger
from clex_train.config.root import Config
from clex_train.engine import deepspeed, liger
from clex_train.utils import distributed, log, versions

KERNELS = ("flash-attn", "liger-kernel", "triton")
"""Optional GPU packages, by their names on PyPI."""

logger = log.get(__name__)


def resolve_attention(config: Config, arch: PretrainedConfig) -> Config:
    """Return the configuration with `attention.implementation=auto` resolved for this machine."""
    # A copy: the run folder records `auto`, so that the run can resume on a machine with other kernels.
    attention = select.resolve_attention(config.attention, arch, deepspeed.precision(config.engine))
    return dataclasses.replace(config, attention=attention)


def install(model: nn.Module, config: Config) -> int:
    """Install Liger's kernels if enabled and available; return the number of modules that use one."""
    if config.engine.liger is Liger.never or liger.refusal() is not None:
        return 0
    return len(liger.install(model, liger.kernels()))


def announce(config: Config, arch: PretrainedConfig, num_replaced: int) -> None:
    """Log the active kernels, and faster packages that are missing. `config` is the result of `resolve_attention`."""
    dtype, attention = deepspeed.precision(config.engine), config.attention
    if attention.lambda_mask:
        logger.info("attention: LM-Infinite; its back end is logged at its first call")
    else:
        # Sequence parallelism splits rows into documents instead of masking.
        masked = config.data.document_mask and config.engine.sequence_parallel == 1
        what = select.describe(attention.implementation, arch, config.data.seq_len, dtype, distributed.device(), masked)
        logger.info("attention: %s%s", what, _why_not_flash(config, arch, dtype))
    if num_replaced:
        logger.info("Liger kernels: %d norms and MLPs", num_replaced)
    if absent := missing():
        logger.info(
            "%s not installed: everything runs without, slower on a GPU (%s)",
            ", ".join(absent),
            versions.install_command("gpu"),
        )


def missing() -> list[str]:
    """List the optional packages that are not installed."""
    return [name for name in versions.missing() if name in KERNELS]


def _why_not_flash(config: Config, arch: PretrainedConfig, dtype: torch.dtype) -> str:
    if config.attention.implementation is not AttentionImplementation.sdpa or not torch.cuda.is_available():
        return ""
    reason = select.flash_unsupported_reason(arch, dtype) or "requested by attention.implementation=sdpa"
    return f" ({reason})"
