"""Facts that engines read from a saved model: config.json as written, and as transformers understands it."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from clex_train.inspection.spectra import LayerRope

TOKENIZER_CONFIG = "tokenizer_config.json"
ORIGINAL, MAX = "original_max_position_embeddings", "max_position_embeddings"


@dataclass(frozen=True)
class FieldFacts:
    """CLEX field of a directory against the frequencies that its config.json gives to other programs."""

    t: float
    """Scale factor of the length that is looked at."""
    context_len: int
    """L in tokens."""
    loaded_t: float | None
    """Scale factor whose frequencies config.json gives; None if it is none of the table's."""
    difference: float
    """Largest relative difference of theta between config.json and the table at `t`."""
    pair: int
    """Pair with that difference."""
    refused: str | None = None
    """Reason why transformers cannot build the model of config.json."""
    log_scale: str = "off"
    """Policy of log-scaling, a value of `LogScale`."""


@dataclass(frozen=True, eq=False)
class Facts:
    """A saved model as its reader sees it."""

    raw: dict[str, Any]
    """config.json of the text model, as written."""
    config: PretrainedConfig
    """The text model's config in transformers."""
    architecture: str
    """Class of the causal language model."""
    ropes: tuple[LayerRope, ...]
    interleaved: bool
    """True if RoPE pairs component 2j with 2j + 1."""
    tokenizer_len: int | None = None
    """`model_max_length` of the tokenizer."""
    field: FieldFacts | None = None

    @property
    def model_type(self) -> str:
        """Model type of the text model."""
        return str(self.config.model_type)

    @property
    def sets(self) -> list[dict[str, Any]]:
        """Return `rope_parameters` of each layer type that has RoPE, as transformers reads them."""
        every = getattr(self.config, "rope_parameters", None) or {}
        nested = [each for each in every.values() if isinstance(each, dict)]
        return [each for each in nested if each] if nested else [every] if every else []

    @property
    def types(self) -> list[str]:
        """Return the rope_type of each set."""
        return [str(each.get("rope_type", "default")) for each in self.sets]

    @property
    def max_len(self) -> int | None:
        """`max_position_embeddings`, in tokens."""
        value = getattr(self.config, MAX, None)
        return int(value) if isinstance(value, (int, float)) else None

    @property
    def is_scaled(self) -> bool:
        """True if the frequencies or the magnitude of some layers are not plain RoPE's, at some length."""
        return any(rope.is_scaled or rope.follows_length for rope in self.ropes)

    def of_type(self, *rope_types: str) -> list[dict[str, Any]]:
        """Return the parameter sets of some rope types."""
        return [each for each in self.sets if each.get("rope_type") in rope_types]

    def loaded(self, rope_type: str) -> list[LayerRope]:
        """Return the RoPEs of a rope type."""
        return [rope for rope in self.ropes if rope.rope_type == rope_type]


def lists_differ(parameters: dict[str, Any]) -> bool:
    """Return True for a longrope whose short and long factors are not equal."""
    return parameters.get("short_factor") != parameters.get("long_factor")


def original_len(parameters: dict[str, Any]) -> int | None:
    """Return the length before scaling that a parameter set states, in tokens."""
    value = parameters.get(ORIGINAL)
    return int(value) if isinstance(value, (int, float)) else None
