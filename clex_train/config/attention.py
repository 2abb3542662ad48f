"""The attention back end, and who may attend to whom."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_TOKENS, require, require_at_most


class AttentionImplementation(Enum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


MOST = {
    "n_local": MOST_TOKENS,
    "n_global": MOST_TOKENS,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class AttentionConfig:
    implementation: AttentionImplementation = AttentionImplementation.auto
    """Attention back end of transformers. `auto`: `flash_attention_2` with flash-attn, a GPU, bf16 and a family that
    has it, else `sdpa`; the log says which."""
    lambda_mask: bool = False
    """Train under LM-Infinite's mask: every token sees the `n_local` latest tokens and the `n_global` first ones."""
    n_local: int | None = None
    """Latest tokens that a token sees under `lambda_mask`; by default L."""
    n_global: int = 10
    """First tokens of a row that every token sees under `lambda_mask`."""

    def __post_init__(self) -> None:
        require_at_most(self, "attention.", MOST)
        require(self.n_local is None or self.n_local >= 1, "attention.n_local", self.n_local, "at least 1 token")
        require(self.n_global >= 0, "attention.n_global", self.n_global, "0 or more tokens")
        require(
            self.lambda_mask or self.n_local is None,
            "attention.n_local",
            self.n_local,
            "it is for LM-Infinite's mask; add attention=lambda",
        )
        require(
            not self.lambda_mask or self.implementation in (AttentionImplementation.auto, AttentionImplementation.sdpa),
            "attention.implementation",
            self.implementation.name,
            "LM-Infinite's mask chooses a back end by itself; leave the key out with attention=lambda",
        )
