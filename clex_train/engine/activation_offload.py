"""Activation offload: keep the inputs of checkpointed layers in pinned host memory until the backward pass.

Only these inputs are moved. Everything else inside a layer is recomputed by activation checkpointing and never saved.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute under which transformers gives each layer the function that recomputes it."""


def offload_to_host() -> AbstractContextManager[None]:
    """Move tensors that are saved for backward inside the block to pinned host memory."""
    # torch's `save_on_cpu` blocks the host on every copy before 2.13.
    return saved_tensors_hooks(_to_host, _to_device)


def install(model: nn.Module, keeping: Callable[[], AbstractContextManager[None]] = offload_to_host) -> None:
    """Wrap the checkpoint function of every layer in `keeping`. Enable gradient checkpointing first."""
    for module in model.modules():
        # transformers sets the function on the instance, so a class attribute of the same name is left alone.
        checkpoint = module.__dict__.get(CHECKPOINT)
        if checkpoint is not None:
            module.__dict__[CHECKPOINT] = partial(_checkpoint, checkpoint, keeping)


def _checkpoint(
    checkpoint: Callable[..., Any], keeping: Callable[[], AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> Any:
    # The non-reentrant checkpoint saves only its own arguments here: inside, it installs hooks of its own.
    with keeping():
        return checkpoint(*args, **kwargs)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # On a CPU the tensor is already where it belongs.
    if not tensor.is_cuda:
        return tensor.device, tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    # Same stream as the compute, so the copy is ordered before the GPU memory is reused.
    return tensor.device, kept.copy_(tensor, non_blocking=True)


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, kept = packed
    return kept.to(device, non_blocking=True)
