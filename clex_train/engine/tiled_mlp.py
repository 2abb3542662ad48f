"""Tiled MLP: run a decoder layer's MLP on a tile of tokens at a time, forward and backward (ALST, arXiv 2506.13996).

An MLP treats each token alone, so tiling changes only the memory: inner activations exist for one tile and are
recomputed in the backward pass (section 3.1.2). Weight gradients are summed over the tiles in float32 or wider before
autograd sees them, so hooks run once and DeepSpeed needs no special case.

Shapes: `B` rows, `S` tokens, `E` width, `T` tokens of a tile.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clex_train.engine.tiled_loss import tiles

NAMES = ("mlp", "feed_forward", "ffn")
"""Names of the MLP in a decoder layer, by family."""


class NotTokenwise(ValueError):
    """An MLP cannot be computed in tiles of tokens; the message gives the reason."""


def find(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the MLPs of decoder layers. Raises `NotTokenwise`, naming any module that mixes tokens."""
    found = []
    for layer in layers:
        mlp = next((child for name, child in layer.named_children() if name in NAMES), None)
        if mlp is None:
            raise NotTokenwise(f"{type(layer).__name__} has no MLP under the names {', '.join(NAMES)}")
        _require_token_by_token(mlp)
        found.append(mlp)
    return found


def install(mlps: Sequence[nn.Module], tile_len: int) -> None:
    """Make each MLP process `tile_len` tokens at a time, on the instance."""
    for mlp in mlps:
        # The parameters are passed to autograd explicitly: it sees the tiles' graph only inside our own backward.
        mlp.__dict__["forward"] = functools.partial(_forward, mlp.forward, tuple(mlp.parameters()), tile_len)


def is_tiled(module: nn.Module) -> bool:
    """Return True if `install` has tiled this module."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward(whole: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], tile_len: int, hidden: Tensor) -> Tensor:
    """Apply `whole` to `hidden` [B, S, E] in tiles of the B * S tokens."""
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    if tokens.shape[1] <= tile_len:
        return whole(hidden)
    if not torch.is_grad_enabled():
        made = _joined(whole, tokens, tile_len)
    else:
        if not tokens.requires_grad:
            # Autograd runs `_Kept`, which saves the input, only if the input requires a gradient. It does not for the
            # first layer over frozen embeddings.
            tokens = tokens.detach().requires_grad_()
        kept = _Kept.apply(tokens)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
        made = _InTiles.apply(kept, kept.grad_fn, whole, tile_len, *parameters)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
    return made.view(*hidden.shape[:-1], -1)


class _Kept(torch.autograd.Function):
    """Saves the input for the backward pass before anything is computed from it.

    torch's checkpointing stops recomputing once the last saved tensor is there. With the input saved here, it stops
    before the MLP, which would otherwise run three times.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0]


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, kept: Any, whole: Callable[[Tensor], Tensor], tile_len: int, *parameters: Tensor
    ) -> Tensor:
        ctx.kept, ctx.whole, ctx.tile_len, ctx.parameters = kept, whole, tile_len, parameters
        return _joined(whole, tokens, tile_len)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        # Through `kept`, not a saved tensor of this function, which would make checkpointing recompute the MLP.
        (outer,), (tokens,) = grad_outputs, ctx.kept.saved_tensors
        needed = ctx.needs_input_grad[4:]
        trained = [p for p, is_needed in zip(ctx.parameters, needed, strict=True) if is_needed]
        # bf16 sums over many tiles lose small gradients, so accumulate in fp32.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        to_tokens = torch.empty_like(tokens)
        for tile in tiles(tokens.shape[1], ctx.tile_len):
            to_tokens[:, tile] = _backward(ctx.whole, tokens[:, tile], outer[:, tile], trained, sums)
        gradients = iter(sums)
        to_parameters = [
            next(gradients).to(p.dtype) if is_needed else None
            for p, is_needed in zip(ctx.parameters, needed, strict=True)
        ]
        return to_tokens, None, None, None, *to_parameters


def _backward(
    whole: Callable[[Tensor], Tensor], part: Tensor, outer: Tensor, trained: Sequence[Tensor], sums: Sequence[Tensor]
) -> Tensor:
    """Compute the gradient of a tile [1, T, E], and add those of the `trained` weights to `sums`."""
    part = part.detach().requires_grad_()
    # Grad mode is off inside a custom backward.
    with torch.enable_grad():
        made = whole(part)
    # `grad`, not `backward`: accumulating into `.grad` would run the weights' hooks once per tile.
    to_part, *to_trained = torch.autograd.grad(made, (part, *trained), outer)
    for total, gradient in zip(sums, to_trained, strict=True):
        total += gradient
    return to_part


def _joined(whole: Callable[[Tensor], Tensor], tokens: Tensor, tile_len: int) -> Tensor:
    """Apply `whole` to each tile of `tokens` [1, B * S, E] and concatenate the results."""
    # Copying into one buffer frees each tile at once; `torch.cat` would hold all results twice.
    joined: Tensor | None = None
    for tile in tiles(tokens.shape[1], tile_len):
        made = whole(tokens[:, tile])
        if joined is None:
            joined = made.new_empty(1, tokens.shape[1], made.shape[-1])
        joined[:, tile] = made
    assert joined is not None
    return joined


def _require_token_by_token(mlp: nn.Module) -> None:
    """Raise `NotTokenwise` for an MLP whose output for a token depends on other tokens or on random numbers."""
    for name, module in mlp.named_modules():
        kind = type(module).__name__
        if any(word in f"{name} {kind}".lower() for word in ("expert", "router", "moe")):
            # A router balances the load over all tokens.
            raise NotTokenwise(f"{type(mlp).__name__} is a mixture of experts, whose tokens are not taken in tiles")
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise NotTokenwise(f"{type(mlp).__name__} has dropout, which would be drawn twice")
        # Anything else with weights of its own, such as a convolution, may mix tokens.
        if not isinstance(module, nn.Linear) and "norm" not in kind.lower() and list(module.parameters(recurse=False)):
            raise NotTokenwise(f"{type(mlp).__name__} has weights in {kind}, which may look at more than one token")
