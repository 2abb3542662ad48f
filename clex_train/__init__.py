"""Distributed long-context fine-tuning with CLEX and LM-Infinite.

The names below are imported when they are first used, because torch and transformers take seconds to import and the
command line should answer at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clex_train.api import apply_clex, apply_lm_infinite, load_for_evaluation
    from clex_train.config.model import ModelConfig

__all__ = ["ModelConfig", "apply_clex", "apply_lm_infinite", "load_for_evaluation"]

_HOMES = {"ModelConfig": "clex_train.config.model"}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "clex_train.api")), name)


def __dir__() -> list[str]:
    """List the public names too, for completion in a shell."""
    return sorted([*globals(), *__all__])
