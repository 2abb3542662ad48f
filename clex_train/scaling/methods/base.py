"""Base class of the RoPE scaling methods: frequency table, Hugging Face parameters, label, settings.

Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.frequency_table import Frequencies, FrequencyTable, as_grid
from clex_train.scaling.spectrum import STILL
from clex_train.utils.errors import ConfigError

TGrid = Tensor | list[float]
ParametersAt = Callable[[float], dict[str, Any]]
"""Scale factor -> `rope_parameters` of transformers."""


@dataclass(frozen=True, eq=False)
class Rope:
    """RoPE that a method starts from: bare frequencies here, a model's in `rope.hf_scalings`."""

    inv_freq: Float[Tensor, " P"]
    """theta_j(1), the frequencies before any scaling, in radians per token."""
    context_len: int = 1
    """L, the context length in tokens that the model was trained on."""
    own: Frequencies | None = None
    """Scaling of the model's own config, if any."""

    @property
    def model_type(self) -> str:
        """Model type, for messages."""
        return "unknown"

    @property
    def theta(self) -> float:
        """Base of the frequencies, rope_theta; `ValueError` without a config that names it."""
        raise ValueError("rope_theta: unknown for frequencies without a model's config")

    def stock_table(self, method: str, t_grid: TGrid, parameters: ParametersAt) -> FrequencyTable:
        """Compute theta(t) and attention factors with transformers' formula for the `rope_parameters` at each t.

        Raises:
            ConfigError: there is no config, or the frequencies are not the plain RoPE that the formulas start from.
        """
        # Only the subclass for a model has the config that the formulas read.
        raise ConfigError("methods", f"[{method}]", f"transformers' formula needs a model's config; leave {method} out")


@dataclass(frozen=True, kw_only=True)
class ScalingMethod(ABC):
    """RoPE scaling method; the dataclass fields of a subclass are its settings.

    A field takes its value from the key of the same name in `scaling` or `evaluation` (`method_settings`). Fields
    without such a key come from `scaling.options` or `evaluation.method_options`.
    """

    prefix: str = "scaling."
    """Config group of the settings, for messages: `scaling.` in training, `evaluation.` in evaluation."""
    options_prefix: str = "scaling.options."
    """Prefix of settings without a key of their own, for messages."""

    title: ClassVar[str]
    """Label without settings."""
    counts_from_context: ClassVar[bool] = False
    """True if transformers' formula reads L from `max_position_embeddings`, which then stays L."""

    @property
    def label(self) -> str:
        """Name of the method in tables and figures."""
        return self.title

    @abstractmethod
    def table(self, rope: Rope, t_grid: TGrid) -> Frequencies:
        """Return theta(t) for every scale factor of `t_grid` [K], ascending from 1."""

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return the `rope_parameters` to change in a stock config, for contexts of up to `factor` * L tokens."""
        return {}

    def changes(self, factor: float) -> bool:
        """Return True if the frequencies at this scale factor differ from the base's."""
        return factor > 1


def constant_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid, method: str) -> FrequencyTable:
    """Build a table with the same frequencies at every t."""
    t = as_grid(t_grid)
    # `expand` is a view of one row; a table that is written to a file needs rows of its own.
    return FrequencyTable(t, inv_freq.double().expand(len(t), -1).clone(), method=method)


def stock_factors(
    rope: Rope, inv_freq: Float[Tensor, " P"], factor: float, attention_factor: float = 1.0
) -> dict[str, Any]:
    """Return the `longrope` rope type that has `inv_freq` at every length, for contexts of `factor` * L tokens."""
    # transformers divides frequencies by these factors; JSON has no infinity for a pair that does not rotate.
    factors = (rope.inv_freq.double() / inv_freq).clamp(max=STILL).tolist()
    return {
        "rope_type": "longrope",
        "factor": float(factor),
        "attention_factor": attention_factor,
        "original_max_position_embeddings": rope.context_len,
        "short_factor": factors,
        "long_factor": factors,
    }
