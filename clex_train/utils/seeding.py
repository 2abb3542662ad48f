"""Randomness as a pure function of (seed, stream, index ...): no generator state to save, lose or advance by accident.

Resume, another number of ranks and gradient accumulation draw the same numbers, because they use the same indices.
"""

import hashlib

import numpy as np


def generator(seed: int, stream: str, *index: int) -> np.random.Generator:
    """Create a counter-based generator (Philox) for one draw site.

    Equal arguments give equal numbers on every rank and machine.
    """
    return np.random.Generator(np.random.Philox(key=_digest(seed, stream, *index)))


def torch_seed(seed: int, stream: str, *index: int) -> int:
    """Derive a 63-bit seed for `torch.manual_seed`, for library code that needs a global generator (dropout, init)."""
    return _digest(seed, stream, *index) >> 65


def _digest(*parts: int | str) -> int:
    # A separator that no stream name contains, so that ("a", 11) and ("a1", 1) differ.
    text = "\x1f".join(str(part) for part in parts)
    # Python's `hash` is salted per process; blake2b is the same everywhere.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
