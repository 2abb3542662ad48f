"""The kernels of a run: chosen before the weights are read, put into the model after, and named in the log once.

Everything runs without the optional packages, slower on a GPU.
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
"""Optional packages that a GPU runs faster with."""

logger = log.get(__name__)


def chosen(config: Config, arch: PretrainedConfig) -> Config:
    """The configuration with a back end in the place of `attention.implementation=auto`, for this machine alone.

    What is kept in the run folder stays `auto`, so that a run goes on where there is another choice.
    """
    attention = select.resolve_attention(config.attention, arch, deepspeed.precision(config.engine))
    return dataclasses.replace(config, attention=attention)


def install(model: nn.Module, config: Config) -> int:
    """Put Liger's kernels into the model if they are wanted and there; returns the number of modules that have one."""
    if config.engine.liger is Liger.never or liger.refusal() is not None:
        return 0
    return len(liger.install(model, liger.kernels()))


def announce(config: Config, arch: PretrainedConfig, num_replaced: int) -> None:
    """Say which kernels run, and which packages are missing that would be faster. `config` as `chosen` gives it."""
    dtype, attention = deepspeed.precision(config.engine), config.attention
    if attention.lambda_mask:
        logger.info("attention: LM-Infinite, whose back end is named at its first call")
    else:
        # Rows that ranks share are cut into documents instead.
        masked = config.data.document_mask and config.engine.sequence_parallel == 1
        what = select.describe(attention.implementation, arch, config.data.seq_len, dtype, distributed.device(), masked)
        logger.info("attention: %s%s", what, _why_not_flash(config, arch, dtype))
    if num_replaced:
        logger.info("liger-kernel computes %d norms and MLPs", num_replaced)
    if absent := missing():
        logger.info(
            "%s not installed: everything runs without, slower on a GPU (pip install -r requirements-gpu.txt)",
            ", ".join(absent),
        )


def missing() -> list[str]:
    """Optional packages that are not installed."""
    return [name for name in versions.missing() if name in KERNELS]


def _why_not_flash(config: Config, arch: PretrainedConfig, dtype: torch.dtype) -> str:
    if config.attention.implementation is not AttentionImplementation.sdpa or not torch.cuda.is_available():
        return ""
    reason = select.flash_unsupported_reason(arch, dtype) or "attention.implementation=sdpa asks for it"
    return f" ({reason})"
