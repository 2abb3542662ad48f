"""Activations of one forward and backward pass, measured without data: the real model runs on the meta device.

Tensors of the meta device have shapes and no memory. Every tensor that the pass creates is counted from its creation
until autograd releases it, so each family, recomputation and the loss are measured by their own code, not by a formula.
For a Llama without recomputation the result is that of Korthikanti et al. (arXiv 2205.05198, section 4), adapted to
RMSNorm, SwiGLU, grouped queries and flash attention: the tests compare the two.
"""

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from clex_train.engine.token_loss import Loss, loss_from_logits, shifted


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch on one rank, without parameters and their gradients."""

    activations: float
    """Saved for the backward pass when the output layer is reached."""
    logits: float
    """Peak on top of the activations, from the output layer to the gradient of its input."""
    layers: float
    """Peak after that, in the backward pass of the layers (activations included)."""
    host: float = 0.0
    """Kept for the backward pass in host memory, on top of these."""

    def extended(self, longer: "Footprint", layers: int) -> "Footprint":
        """Extrapolate to `layers` more layers from `longer`, which has one more: bytes are linear in the layers."""
        return Footprint(
            activations=self.activations + layers * (longer.activations - self.activations),
            logits=self.logits,
            layers=self.layers + layers * (longer.layers - self.layers),
            host=self.host + layers * (longer.host - self.host),
        )


def measure(model: PreTrainedModel, input_ids: Tensor, loss: Loss = loss_from_logits) -> Footprint:
    """Run a loss of `input_ids` [B, S] and its backward pass; `model` is a causal LM of transformers.

    Each gradient of a parameter is dropped as soon as it is complete: the engine's gradients are counted elsewhere.
    """
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]
    counter, marks = LiveBytes(model), _Marks()
    head: Any = model.get_output_embeddings()
    hooks.append(head.register_forward_pre_hook(lambda _, args: marks.reached_head(counter, args[0])))
    try:
        with counter:
            loss(model, shifted(input_ids), input_ids=input_ids).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Footprint(marks.at_head, marks.peak_of_head - marks.at_head, counter.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages created inside; `peak` is the largest number since its reset."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves TorchDispatchMode untyped
        self.live = self.peak = 0
        # Keep these storages alive, so that no new one reuses the id of an old one.
        self._own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._bytes = {id(storage): 0 for storage in self._own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _on_meta(func, args) if _is_meta(args) else None
        result = func(*args, **(kwargs or {})) if result is None else result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def restart_peak(self) -> int:
        """Forget the peak so far and return it."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._bytes:
            return
        self._bytes[id(storage)] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, id(storage))

    def _release(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


class SizesOnHost:
    """Moves tensors saved for the backward pass off the meta device and counts them; autograd gets them back on use."""

    def __init__(self) -> None:
        self.bytes = 0

    def keeping(self) -> AbstractContextManager[None]:
        """Keep the tensors that are saved inside on the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype, tensor.device

    def _unpack(self, packed: Any) -> Tensor:
        shape, dtype, device = packed
        return torch.empty(shape, dtype=dtype, device=device)


class SizesOfFlashAttention(torch.autograd.Function):
    """Memory of a fused attention kernel without its arithmetic, for q [B, H, S, D] and k, v [B, H_kv, S, D].

    It keeps q, k, v, the output and one float32 a row and head (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention_by_sizes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Apply `SizesOfFlashAttention` with the signature of transformers' attention interface."""
    return SizesOfFlashAttention.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped


class _Marks:
    """Bytes counted at the entry and the exit of the output layer."""

    def __init__(self) -> None:
        self.at_head = self.peak_of_head = 0

    def reached_head(self, counter: LiveBytes, hidden: Tensor) -> None:
        self.at_head = counter.live
        counter.restart_peak()
        hidden.register_hook(lambda _: self._left_head(counter))

    def _left_head(self, counter: LiveBytes) -> None:
        self.peak_of_head = counter.restart_peak()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _is_meta(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].is_meta


def _on_meta(func: Any, args: Any) -> Any:
    """Return the result of the few operations that the meta device lacks; None for all others."""
    if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
        # transformers asks for one such value only: whether the row is unbroken, and ours are.
        return True
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
        # The matrix product of a mixture of experts has a meta kernel for bfloat16 only.
        left, right = args[0], args[1]
        groups = () if left.dim() + right.dim() != 4 else (args[2].shape[0],)
        return left.new_empty(*groups, left.shape[-2], right.shape[-1])
    return None
