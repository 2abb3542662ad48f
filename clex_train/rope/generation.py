"""Generation beyond L in families whose own code drops the cache there.

Phi-3 changes its list of frequencies behind `original_max_position_embeddings`, and starts with an empty cache for it.
Cached keys of a scaled RoPE are rotated instead, so nothing has to be computed again. transformers before 5.20 even fed
the empty cache with a single token.
"""

from types import MethodType

from torch import nn
from transformers import GenerationMixin

NAME = "prepare_inputs_for_generation"
PLAIN = GenerationMixin.prepare_inputs_for_generation
LIMIT = "original_max_position_embeddings"
"""Key of a config with two lists of frequencies."""


class KeptCache:
    """Lets a model's `generate` keep its cache at L, until `remove`; does nothing to families that keep it anyway."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own = getattr(type(model), NAME, None)
        self.is_active = own not in (None, PLAIN) and hasattr(getattr(model, "config", None), LIMIT)
        if self.is_active:
            # On the instance, bound, so that a deep copy has a method of its own.
            setattr(model, NAME, MethodType(PLAIN, model))

    def remove(self) -> None:
        """Restore the model's own method."""
        if self.is_active:
            delattr(self.model, NAME)
