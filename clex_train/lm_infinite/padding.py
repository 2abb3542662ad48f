"""Rows with padding anywhere, brought to rows with padding at the front only, where distances are index differences.

Shapes: `B` batch, `K` heads, `T` tokens, `D` width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def left_pad_order(valid: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """The index of each token in the row with its padding moved to the front; None when it is there already."""
    if valid.shape[1] == 1 or bool((valid[:, 1:] >= valid[:, :-1]).all()):
        return None
    return valid.to(torch.int8).argsort(dim=1, stable=True)


def gather_tokens(x: Float[Tensor, "B K T D"], order: Int[Tensor, "B S"] | None) -> Float[Tensor, "B K S D"]:
    """Tokens of every row by their index; None leaves `x`."""
    return x if order is None else x.take_along_dim(order[:, None, :, None].to(x.device), dim=2)


def invert_order(order: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """The order that undoes `order`."""
    return None if order is None else order.argsort(dim=1)
