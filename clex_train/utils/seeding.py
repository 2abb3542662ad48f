"""Randomness as a pure function of (seed, stream, index ...): no generator state to save, lose or advance by accident.

Resume, another number of ranks and gradient accumulation draw the same numbers because they ask for the same indices.
"""

import hashlib

import numpy as np


def generator(seed: int, stream: str, *index: int) -> np.random.Generator:
    """A fresh counter-based generator (Philox) for one draw site; equal arguments give equal numbers everywhere."""
    return np.random.Generator(np.random.Philox(key=_digest(seed, stream, *index)))


def torch_seed(seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed for `torch.manual_seed`, for library code that insists on a global generator (dropout, init)."""
    return _digest(seed, stream, *index) >> 65


def _digest(*parts: int | str) -> int:
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
