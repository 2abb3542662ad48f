"""Pseudorandom permutation of {0 .. n-1}, computed instead of stored: O(1) memory and time for any n.

Generalised Feistel network on the grid a x b >= n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002, section 5): each round replaces one half by its sum with a keyed hash of the other, modulo the size of its
axis. With a = ceil(sqrt n) and b = ceil(n / a), fewer than a grid points lie beyond n; cycle walking skips them.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

NUM_ROUNDS = 8  # even, so that both halves end on the axis they began on
_MASK = (1 << 64) - 1


class Permutation:
    """Bijection of range(size), determined by the random generator passed in.

    Raises:
        ValueError: size is less than 1.
    """

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        if size < 1:
            raise ValueError(f"size={size}: a permutation needs at least 1 element")
        self.size = size
        self._a = isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = [int(key) for key in generator.integers(0, 1 << 64, NUM_ROUNDS, dtype=np.uint64)]

    def __call__(self, index: int) -> int:
        """Return the image of `index` in range(size)."""
        assert 0 <= index < self.size, index
        image = self._encrypt(index)
        while image >= self.size:  # terminates: the cycle of `index` contains `index` itself, which is in range
            image = self._encrypt(image)
        return image

    def _encrypt(self, x: int) -> int:
        right, left = divmod(x, self._a)
        modulus, other = self._a, self._b
        for key in self._keys:
            left, right = right, (left + _mix(right ^ key)) % modulus
            modulus, other = other, modulus
        return right * self._a + left


def _mix(x: int) -> int:
    """Mix 64 bits with the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
