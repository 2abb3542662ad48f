"""What recomputed layers start from, in host memory: the inputs that activation checkpointing keeps, and nothing else.

Hooks around the checkpoint of a layer see its input alone, since what the layer computes is not saved there. Copies go
to pinned memory and back and do not make the host wait, which torch's `save_on_cpu` does before 2.13. On a CPU they
are where they belong already.
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


def on_host() -> AbstractContextManager[None]:
    """Tensors that are saved for the backward pass inside go to pinned host memory."""
    return saved_tensors_hooks(_to_host, _to_device)


def install(model: nn.Module, keeping: Callable[[], AbstractContextManager[None]] = on_host) -> None:
    """Have each layer of a model, whose layers are recomputed already, keep its input as `keeping` says."""
    for module in model.modules():
        checkpoint = module.__dict__.get(CHECKPOINT)
        if checkpoint is not None:
            module.__dict__[CHECKPOINT] = partial(_checkpoint, checkpoint, keeping)


def _checkpoint(
    checkpoint: Callable[..., Any], keeping: Callable[[], AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> Any:
    with keeping():
        return checkpoint(*args, **kwargs)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if not tensor.is_cuda:
        return tensor.device, tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, kept.copy_(tensor, non_blocking=True)


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, kept = packed
    return kept.to(device, non_blocking=True)
