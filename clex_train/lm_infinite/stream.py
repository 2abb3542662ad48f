"""What passes between the parts of Lambda-shaped attention: keys, where a call stands, how positions enter.

Shapes: `B` batch, `K` key heads, `T` keys, `D` and `V` widths.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Rotation(Protocol):
    """How a model turns queries and keys [B, H, S, D] by position; only distances matter, so positions stay small."""

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        """`x` with its tokens at positions first, first + 1, ..."""

    def constant(self, x: Tensor, position: int) -> Tensor:
        """`x` with every token at `position`, which may be negative."""


class NoRotation:
    """For models whose positions enter the scores alone (ALiBi)."""

    def consecutive(self, x: Tensor, first: int) -> Tensor:
        """`x`."""
        return x

    def constant(self, x: Tensor, position: int) -> Tensor:
        """`x`."""
        return x


class KeyValues(NamedTuple):
    """Unrotated keys and their values."""

    keys: Float[Tensor, "B K T D"]
    values: Float[Tensor, "B K T V"]

    def span(self, first: int, last: int) -> "KeyValues":
        """Tokens first..last-1."""
        return KeyValues(self.keys[:, :, first:last], self.values[:, :, first:last])


class RotatedKeys(NamedTuple):
    """The keys of a window rotated already, the first of them at `position`, for a cache that keeps them so."""

    keys: Float[Tensor, "B K T D"]
    position: int


@dataclass(frozen=True)
class Stream:
    """Where a call stands: `num_tokens` were seen by its end, of which `num_padding` [B] at the front are padding."""

    num_tokens: int
    num_padding: Int[Tensor, " B"] | None = None


class Place(NamedTuple):
    """Where a block lies: the first query's index among the block's keys; both firsts in the stream with padding."""

    offset: int
    first_query: int
    first_key: int
