"""Reference implementation of Lambda-shaped attention by its definition, with dense score tables."""

import torch
from torch import Tensor

from clex_train.lm_infinite.stream import KeyValues


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def starting_tokens(keys: Tensor, values: Tensor, n_global: int, padding: Tensor | None = None) -> KeyValues | None:
    """Return the first `n_global` tokens of each row after its `padding` [B]."""
    if n_global == 0:
        return None
    first = torch.zeros(len(keys), dtype=torch.int64) if padding is None else padding
    index = (first[:, None] + torch.arange(n_global)).clamp(max=keys.shape[2] - 1)[:, None, :, None]
    return KeyValues(*(x.take_along_dim(index, dim=2) for x in (keys, values)))


class PlainRotation:
    """RoPE of base 1e4 over the leading `rotary_dim` components, in the dtype of its input."""

    def __init__(self, rotary_dim: int) -> None:
        self.rotary_dim = rotary_dim
        self.inv_freq = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` [..., D] to `positions`, which broadcast over the leading axes of x."""
        angle = positions[..., None].double() * self.inv_freq
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second, rest = x.split([self.rotary_dim // 2, self.rotary_dim // 2, x.shape[-1] - self.rotary_dim], -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((*turned, rest.expand(*turned[0].shape[:-1], -1)), dim=-1)

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        return self.at(x, torch.arange(first, first + x.shape[2]))

    def constant(self, x: Tensor, position: int) -> Tensor:
        return self.at(x, torch.full((x.shape[2],), position))


class Unrotated:
    """Identity rotation, for ALiBi."""

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        return x

    def constant(self, x: Tensor, position: int) -> Tensor:
        return x


def dense_lambda(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    n_local: int,
    n_global: int,
    rotation: PlainRotation | Unrotated,
    valid: Tensor | None = None,
    best: int = 0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Compute [B, H, N, D] from an explicit N x N x D table of keys at their distances.

    `valid` [B, N] is False at padding; padded queries get zeros. The `best` middle keys are attended at distance L / 2.
    """
    num_rows, num_heads, num_tokens, width = query.shape
    keys, values = (x.repeat_interleave(num_heads // keys.shape[1], dim=1) for x in (keys, values))
    valid = torch.ones(num_rows, num_tokens, dtype=torch.bool) if valid is None else valid
    slopes = torch.zeros(num_heads) if slopes is None else slopes
    rank = valid.long().cumsum(1) - 1
    output = torch.zeros_like(query)
    for row in range(num_rows):
        distance = rank[row][:, None] - rank[row][None, :]
        past = valid[row][:, None] & valid[row][None, :] & (distance >= 0)
        visible = past & ((distance < n_local) | (rank[row][None, :] < n_global))

        def scores_at(distances: Tensor, row: int = row) -> Tensor:
            turned = rotation.at(query[row][:, :, None], distances)
            biased = (turned * keys[row][:, None]).sum(-1) / width**0.5
            return biased - slopes[:, None, None].to(biased.dtype) * distances

        scores = scores_at(distance.clamp(0, n_local)).masked_fill(~visible, float("-inf"))
        if best:
            halfway = scores_at(torch.full_like(distance, n_local // 2)).masked_fill(~(past & ~visible), float("-inf"))
            place = halfway.argsort(dim=-1, descending=True).argsort(dim=-1)
            scores = torch.where((place < best) & halfway.isfinite(), halfway, scores)
        weights = scores.softmax(-1)
        output[row] = weights.masked_fill(~valid[row][:, None], 0.0) @ values[row]
    return output
