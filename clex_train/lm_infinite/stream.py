"""Types shared by the parts of Lambda-shaped attention: keys and values, place in the stream, rotation.

Shapes: `B` batch, `K` key heads, `T` keys, `D` and `V` head dims.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Rotation(Protocol):
    """A model's rotation of queries and keys [B, H, S, D] by position.

    Only distances matter, so positions stay small.
    """

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        """Rotate `x` with its tokens at positions first, first + 1, ..."""

    def constant(self, x: Tensor, position: int) -> Tensor:
        """Rotate `x` with every token at `position`, which may be negative."""


class NoRotation:
    """Identity rotation, for models whose positions enter the scores alone (ALiBi)."""

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        """Return `x`."""
        return x

    def constant(self, x: Tensor, position: int) -> Tensor:
        """Return `x`."""
        return x


class KeyValues(NamedTuple):
    """Unrotated keys and their values."""

    keys: Float[Tensor, "B K T D"]
    values: Float[Tensor, "B K T V"]

    def span(self, first: int, last: int) -> "KeyValues":
        """Return tokens first..last-1."""
        return KeyValues(self.keys[:, :, first:last], self.values[:, :, first:last])


class RotatedKeys(NamedTuple):
    """Keys of a window, already rotated, the first of them at `position`."""

    keys: Float[Tensor, "B K T D"]
    position: int


@dataclass(frozen=True)
class Stream:
    """Progress of a stream: `num_tokens` seen by the end of a call, `num_padding` [B] of them padding at the front."""

    num_tokens: int
    num_padding: Int[Tensor, " B"] | None = None


class Place(NamedTuple):
    """Place of a block: its first query's index among its keys, and the stream indices of its first query and key."""

    offset: int
    first_query: int
    first_key: int
