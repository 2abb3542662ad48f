"""Tiled linear cross-entropy: the logits of all tokens never exist at once.

    y_i = W h_i + b        z = c tanh(s y / c)        loss = sum_i (logsumexp(z_i) - z_i[target_i])

Gradients of a tile are computed in the forward pass, while its logits exist, and scaled in the backward pass, as in
Liger's fused linear cross-entropy (Hsu et al., arXiv 2410.10989, section 3.2), which is used on a GPU if installed. To
autograd this is one function of h, W and b, so hooks on a weight run once, with its complete gradient.

Shapes: `N` tokens, `T` tokens of a tile, `E` width, `V` vocabulary. `s`: logit scale, `c`: soft cap of the family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a token that is not scored, as in transformers."""


@dataclass(frozen=True)
class Logits:
    """A family's transform of its output layer's product y: z = softcap * tanh(scale * y / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    """None for no cap: z = scale * y."""

    @staticmethod
    def from_config(config: Any) -> "Logits":
        """Read the transform from an architecture's config."""
        # Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma caps.
        text = config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        return Logits(scale, getattr(text, "final_logit_softcapping", None))

    def apply_(self, y: Tensor) -> Tensor | None:
        """Turn y into z in place; return dz/dy, or None where it is 1 everywhere."""
        # In place throughout: a tile of logits is the largest tensor of the step.
        if self.softcap is None:
            return None if self.scale == 1.0 else y.mul_(self.scale).new_tensor(self.scale)
        y.mul_(self.scale / self.softcap).tanh_()
        slope = torch.square(y).neg_().add_(1.0).mul_(self.scale)
        y.mul_(self.softcap)
        return slope


def tiled_cross_entropy(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, tile_len: int, logits: Logits
) -> Tensor:
    """Sum the nll of the scored tokens, tile by tile: [] in float32 or wider; 0 when no token is scored.

    `hidden` [N, E]; `targets` int64 [N], `IGNORED` where a token is not scored; `weight` [V, E]; `bias` [V] or None.
    """
    # Without autograd there is no gradient to compute along with the loss.
    if torch.is_grad_enabled():
        total: Tensor = _TiledCrossEntropy.apply(hidden, targets, weight, bias, tile_len, logits)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
        return total
    losses = [
        _scored_nll(logits_of(hidden[tile], weight, bias), targets[tile], logits).loss
        for tile in tiles(len(hidden), tile_len)
    ]
    return torch.stack(losses).sum()


def fused_cross_entropy(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, tile_len: int, logits: Logits
) -> Tensor:
    """Compute the same with Liger's kernel, which chooses its own tiles and sums weight gradients in float32."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", softcap=logits.softcap, accum_dtype=torch.float32
    )
    # Liger has no scale for logits. Scaling `hidden` is the same as long as there is no bias.
    total: Tensor = cross_entropy(weight, hidden if logits.scale == 1.0 else hidden * logits.scale, targets, bias)
    return total


def implementation(device: torch.device, bias: bool, logits: Logits) -> Callable[..., Tensor]:
    """Choose Liger's kernel on a GPU where it is installed, unless it would have to scale a bias too."""
    scaled_bias = bias and logits.scale != 1.0
    fused = device.type == "cuda" and find_spec("liger_kernel") is not None and not scaled_bias
    return fused_cross_entropy if fused else tiled_cross_entropy


def tiles(num_tokens: int, tile_len: int) -> list[slice]:
    """Cut `num_tokens` tokens into slices of at most `tile_len`."""
    return [slice(start, min(start + tile_len, num_tokens)) for start in range(0, num_tokens, tile_len)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute W h + b [..., V] for `hidden` [..., E], in float32 or wider and in fresh memory."""
    # The product runs in the weights' dtype, as in transformers, which also casts only the result.
    made = nn.functional.linear(hidden, weight, bias)
    return made.to(torch.promote_types(made.dtype, torch.float32))


def nll_in_place(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the nll and the normalizer sum(exp(scores - max)), each [...], overwriting `scores`.

    `scores` [..., V] become exp(scores - max); divided by the normalizer they are the softmax.
    """
    # Gather the target's score before the buffer is overwritten.
    chosen = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    largest = scores.amax(dim=-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(dim=-1)
    return total.log() + largest.squeeze(-1) - chosen, total


@dataclass
class _Scored:
    """Loss of a tile, and the tensors that its gradient is computed from."""

    loss: Tensor
    exponentials: Tensor
    total: Tensor
    slope: Tensor | None
    targets: Tensor
    is_scored: Tensor

    def gradient(self) -> Tensor:
        """Compute d loss / d y [T, V] in the memory of the logits: (softmax - one_hot) * dz/dy."""
        gradient = self.exponentials.div_(self.total.unsqueeze(-1))
        gradient.scatter_add_(-1, self.targets.unsqueeze(-1), gradient.new_full((), -1.0).expand(len(gradient), 1))
        gradient.masked_fill_(~self.is_scored.unsqueeze(-1), 0.0)
        return gradient if self.slope is None else gradient.mul_(self.slope)


def _scored_nll(scores: Tensor, targets: Tensor, logits: Logits) -> _Scored:
    """Compute the loss of a tile from `scores` [T, V], which are overwritten, and `targets` int64 [T]."""
    is_scored = targets.ne(IGNORED)
    # `gather` needs valid indices; what they pick is masked below. A mask keeps the shapes static, where selecting
    # the scored tokens would make the host wait for their number.
    targets = targets.masked_fill(~is_scored, 0)
    slope = logits.apply_(scores)
    nll, total = nll_in_place(scores, targets)
    return _Scored(nll.masked_fill(~is_scored, 0.0).sum(), scores, total, slope, targets, is_scored)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, tile_len: int, logits: Logits
    ) -> Tensor:
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # bf16 sums over hundreds of tiles lose small gradients, so accumulate in fp32.
        summed = torch.promote_types(weight.dtype, torch.float32)
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(weight, dtype=summed) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=summed) if bias is not None and wants_bias else None
        losses = []
        for tile in tiles(len(hidden), tile_len):
            loss, gradient = _loss_and_gradient(hidden[tile], targets[tile], weight, bias, logits)
            losses.append(loss)
            if to_bias is not None:
                to_bias += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[tile])
            if to_weight is not None:
                _add_product(to_weight, gradient.T, hidden[tile])
            # Free it now, or it would coexist with the next tile's logits.
            del gradient
        ctx.gradients = to_hidden, to_weight, to_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        # Drop the reference: autograd steals a gradient that nobody else refers to, and copies it otherwise.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the tiled loss supports one backward pass"
        to_hidden, to_weight, to_bias = (
            None if gradient is None else gradient.mul_(grad_outputs[0].to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return to_hidden, None, to_weight, to_bias, None, None


def _loss_and_gradient(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor]:
    """Compute the loss of a tile and its gradient with respect to W h + b [T, V]."""
    scored = _scored_nll(logits_of(hidden, weight, bias), targets, logits)
    return scored.loss, scored.gradient()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which may have a wider dtype."""
    if total.dtype == left.dtype:
        # No temporary of the size of the weight; addmm needs one dtype throughout.
        total.addmm_(left, right)
    else:
        total += left @ right
