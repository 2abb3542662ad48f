"""The attention back end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AttentionImplementation(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


@dataclass
class AttentionConfig:
    implementation: AttentionImplementation = AttentionImplementation.sdpa
    """Attention back end of transformers; `flash_attention_2` needs flash-attn and a GPU."""
