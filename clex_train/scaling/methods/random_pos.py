"""Randomised positions: plain RoPE, each sequence at ordered random positions (Ruoss et al., arXiv 2305.16843).

The positions do the work (`scaling.positions`), in training alone; such a model is read at plain positions.
"""

from dataclasses import dataclass
from typing import ClassVar

from clex_train.scaling.methods.none import Plain


@dataclass(frozen=True)
class RandomPositions(Plain):
    """The base frequencies at every t."""

    title: ClassVar[str] = "RandomPos"


METHOD = RandomPositions
