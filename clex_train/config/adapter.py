"""Config group `adapter`: train low-rank adapters on frozen weights instead of all weights (LoRA, LongLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from clex_train.utils.errors import require, require_at_most

MOST = {"r": 2**14, "alpha": 1e6}
"""Upper bounds that catch typing errors."""


class AdapterKind(Enum):
    """Choices of what a run trains of its model."""

    none = "none"
    lora = "lora"


@dataclass
class AdapterConfig:
    """The `adapter` group: rank, adapted layers, and what is trained whole beside them."""

    name: AdapterKind = AdapterKind.none
    """`none` trains every weight; `lora` adds B A of rank `r` to linear layers, and freezes the weights below them."""
    r: int = 16
    """Rank of the adapters, at least 1."""
    alpha: float = 32.0
    """Numerator of the adapters' scale: W x + (alpha / r) B A x; above 0."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training drops; 0 to 1, exclusive."""
    targets: list[str] = field(default_factory=lambda: ["attention"])
    """Adapted linear layers of the decoder: `attention` (all of its projections), `all-linear`, or last parts of names
    such as q_proj."""
    train_embeddings: bool = False
    """Also train the input embedding whole, and with it an output layer that is tied to it."""
    train_norms: bool = False
    """Also train the weights of all norms."""
    save: bool = False
    """Write the adapter beside the merged model too, in peft's format, into `final/adapter/`."""

    def __post_init__(self) -> None:
        require_at_most(self, "adapter.", MOST)
        require(self.r >= 1, "adapter.r", self.r, "at least 1")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "at least 0 and below 1")
        require(len(self.targets) > 0, "adapter.targets", self.targets, "name a layer, or `attention` or `all-linear`")
        for target in self.targets:
            # A part that is a number would name one layer of the decoder, and the adapters are the same in all of them.
            parts = target.split(".")
            is_name = all(part.replace("-", "_").isidentifier() for part in parts)
            require(is_name, "adapter.targets", target, "last parts of the names of linear layers, such as q_proj")

    def require_used(self) -> None:
        """Raise `ConfigError` for settings of an adapter that the run does not have."""
        unset = AdapterConfig(name=self.name)
        for each in fields(self):
            # Training every weight is far from what `adapter.r=64` alone asks for.
            value = getattr(self, each.name)
            is_set = value != getattr(unset, each.name)
            require(
                self.is_used or not is_set,
                f"adapter.{each.name}",
                value,
                "adapter=none trains every weight; choose adapter=lora or adapter=longlora too",
            )

    @property
    def is_used(self) -> bool:
        """True if the run trains adapters."""
        return self.name is not AdapterKind.none
