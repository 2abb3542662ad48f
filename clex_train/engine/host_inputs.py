"""What recomputed layers start from, in host memory: the inputs that activation checkpointing keeps, and nothing else.

torch's `save_on_cpu` around the checkpoint of a layer sees its input alone, since what the layer computes is not saved
there. Copies go through pinned memory and do not make the host wait. On a CPU they are where they belong already.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute under which transformers gives each layer the function that recomputes it."""


def on_host() -> AbstractContextManager[None]:
    """Tensors that are saved for the backward pass inside go to pinned host memory."""
    return save_on_cpu(pin_memory=torch.cuda.is_available())


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
