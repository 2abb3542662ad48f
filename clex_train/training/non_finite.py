"""Find the first module with an output or gradient that is not finite, by a second forward and backward pass.

Runs on the failing micro-batch after the step: hooks on every output of every step would synchronize with the device
each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clex_train.engine.nan_check import non_finite_parameter

if TYPE_CHECKING:
    from clex_train.scaling.solver import UnstableField
    from clex_train.utils.protocols import CausalLM

DIVERGED = 2.0
"""Ratio of the loss to that of the first step above which the model has diverged."""
LARGEST_LR = 0.1
"""AdamW moves a weight by about the learning rate in a step, and weights are of the order of 0.01 to 1."""


class FirstNonFinite:
    """Names of the first modules with non-finite values, None for none.

    `output` is the first in the forward pass by its output, `gradient` the first in the backward pass by the gradient
    of its output.
    """

    def __init__(self) -> None:
        self.output: str | None = None
        self.gradient: str | None = None

    @contextmanager
    def watching(self, model: CausalLM) -> Iterator[None]:
        """Register hooks on every module of `model` within the block."""
        handles = [
            module.register_forward_hook(self._hook(name or type(model).__name__))
            for name, module in model.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __bool__(self) -> bool:
        return self.output is not None or self.gradient is not None

    def __str__(self) -> str:
        if self.output:
            return f"first in the output of {self.output}"
        if self.gradient:
            return f"first in the gradient of the output of {self.gradient}"
        return "not again in a second pass, or in the gradients of weights alone"

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if self.output is None and not tensor.isfinite().all():
                    self.output = name
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_back(name, gradient))

        return look

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not gradient.isfinite().all():
            self.gradient = name


def find(model: CausalLM, loss: Callable[[], Tensor]) -> FirstNonFinite:
    """Run `loss` and its backward pass under watch; no gradient is left on any parameter. Collective under ZeRO-3."""
    found, embedded = FirstNonFinite(), []
    # A frozen embedding's output requires no gradient by itself.
    first = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output if output.requires_grad else output.requires_grad_())
    )
    try:
        with found.watching(model):
            # Towards the embedding's output and no further: the weights' gradients are not computed.
            torch.autograd.grad(loss(), embedded[:1], allow_unused=True)
    finally:
        first.remove()
    return found


def remedy(model: nn.Module) -> str:
    """Advise on losses or gradients that are not finite; collective."""
    name = non_finite_parameter(model)
    if name is None:
        return "lower optim.lr in another output_dir, or leave the rows out"
    return f"the weights of {name} are not finite: start from others"


def why_unstable(model: nn.Module, error: UnstableField, losses: Sequence[float], lr: float) -> str:
    """Explain an unusable field; the model is the cause if its weights or losses have diverged. Collective."""
    spoilt = non_finite_parameter(model)
    if spoilt:
        return f"the weights of {spoilt} are not finite, and {error.what}; lower optim.lr={lr:g}"
    if losses and not losses[-1] <= DIVERGED * losses[0]:
        return f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}, and {error.what}; lower optim.lr={lr:g}"
    if lr > LARGEST_LR:
        return f"optim.lr={lr:g} moves every weight by as much in a step, and {error.what}; lower optim.lr"
    return str(error)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
