"""Randomised positions: plain RoPE, each sequence at ordered random positions (Ruoss et al., arXiv 2305.16843).

Only training samples positions (`scaling.positions`); evaluation uses plain ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from clex_train.scaling.methods.none import Plain


@dataclass(frozen=True)
class RandomPositions(Plain):
    """Randomised positions in training; base frequencies at every t."""

    title: ClassVar[str] = "RandomPos"


METHOD = RandomPositions
