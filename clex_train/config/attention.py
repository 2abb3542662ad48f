"""Config group `attention`: back end and mask."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


class AttentionImplementation(Enum):
    """Attention back ends of transformers, and `auto` for the best one that is installed."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


# flash-attn 2 compiles its kernels for head dims up to this one.
MAX_FLASH_HEAD_DIM = 256
MOST = {
    "n_local": MOST_TOKENS,
    "n_global": MOST_TOKENS,
}
"""Upper bounds that catch typing errors."""


@dataclass
class AttentionConfig:
    """The `attention` group: back end and LM-Infinite."""

    implementation: AttentionImplementation = AttentionImplementation.auto
    """Attention back end of transformers. `auto`: `flash_attention_2` with flash-attn, a GPU, bf16 and a supporting
    family, else `sdpa`; the log names the choice."""
    lambda_mask: bool = False
    """Train with LM-Infinite's mask: every token attends to the `n_local` latest and the `n_global` first tokens."""
    n_local: int | None = None
    """Latest tokens visible to a token with `lambda_mask`, at least 1; null: L."""
    n_global: int = 10
    """First tokens of a row visible to every token with `lambda_mask`, 0 or more."""

    def __post_init__(self) -> None:
        # A value without its switch is refused, not ignored: the run would silently use full attention.
        require_at_most(self, "attention.", MOST)
        require(self.n_local is None or self.n_local >= 1, "attention.n_local", self.n_local, "at least 1 token")
        require(self.n_global >= 0, "attention.n_global", self.n_global, "0 or more tokens")
        require(
            self.lambda_mask or self.n_local is None,
            "attention.n_local",
            self.n_local,
            "applies only to LM-Infinite's mask; add attention=lambda",
        )
        # lm_infinite/ selects its own back end by device and length, so another choice would be ignored.
        require(
            not self.lambda_mask or self.implementation in (AttentionImplementation.auto, AttentionImplementation.sdpa),
            "attention.implementation",
            self.implementation.name,
            "LM-Infinite's mask selects its back end; leave the key out with attention=lambda",
        )
