"""Move padding to the front of each row, where distances equal index differences.

Shapes: `B` batch, `K` heads, `T` tokens, `D` head dim.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def left_pad_order(valid: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """Return the token indices that move each row's padding to its front; None when it is already there."""
    if valid.shape[1] == 1 or bool((valid[:, 1:] >= valid[:, :-1]).all()):
        return None
    # A stable sort keeps the tokens in order.
    return valid.to(torch.int8).argsort(dim=1, stable=True)


def gather_tokens(x: Float[Tensor, "B K T D"], order: Int[Tensor, "B S"] | None) -> Float[Tensor, "B K S D"]:
    """Select tokens of each row by index; None returns `x`."""
    return x if order is None else x.take_along_dim(order[:, None, :, None].to(x.device), dim=2)


def invert_order(order: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """Return the order that undoes `order`."""
    return None if order is None else order.argsort(dim=1)
