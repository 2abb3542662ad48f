"""What a method of scaling RoPE gives: a frequency table, Hugging Face parameters, a label, and settings of its own.

Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.table import Frequencies, FrequencyTable, as_grid
from clex_train.utils.errors import ConfigError

TGrid = Tensor | list[float]
ParametersAt = Callable[[float], dict[str, Any]]
"""Scale factor -> `rope_parameters` of transformers."""


@dataclass(frozen=True, eq=False)
class Rope:
    """The RoPE that a method starts from: frequencies alone here, those of a model in `rope.hf_scalings`."""

    inv_freq: Float[Tensor, " P"]
    """theta_j(1), the frequencies before any scaling, in radians per token."""
    context_len: int = 1
    """L, the context in tokens that the model was trained on."""
    own: Frequencies | None = None
    """The scaling that the model brings along."""

    @property
    def model_type(self) -> str:
        """The family, for messages."""
        return "unknown"

    @property
    def theta(self) -> float:
        """The base of the frequencies, rope_theta; `ValueError` where no config names it."""
        raise ValueError("rope_theta: unknown for frequencies without a model's config")

    def stock_table(self, method: str, t_grid: TGrid, parameters: ParametersAt) -> FrequencyTable:
        """Compute theta(t) and the attention factors by transformers' formula for the `rope_parameters` of each t.

        Raises:
            ValueError: no config, or frequencies that are not the plain ones that the formulas start from.
        """
        raise ConfigError("methods", f"[{method}]", f"transformers' formula needs a model's config; leave {method} out")


@dataclass(frozen=True, kw_only=True)
class ScalingMethod(ABC):
    """A method of scaling RoPE. The dataclass fields of a subclass are its settings.

    A field takes the value of the key of this name in `scaling` or `evaluation` where there is one (`method_settings`),
    else that of `scaling.options` or `evaluation.method_options`.
    """

    prefix: str = "scaling."
    """Group of the settings in messages: `scaling.` in training, `evaluation.` in evaluation."""
    options_prefix: str = "scaling.options."
    """The same for settings without a key in the group."""

    title: ClassVar[str]
    """The label, without settings."""
    follows_length: ClassVar[bool] = False
    """transformers computes the frequencies again for the length of each call, so a run trains at those of its rows."""
    counts_from_context: ClassVar[bool] = False
    """transformers counts from `max_position_embeddings`, which stays L."""

    @property
    def label(self) -> str:
        """The method's name in tables and figures."""
        return self.title

    @abstractmethod
    def table(self, rope: Rope, t_grid: TGrid) -> Frequencies:
        """Return theta(t) for every scale factor of `t_grid` [K], ascending from 1."""

    def hf_parameters(self, rope: Rope, factor: float) -> dict[str, Any]:
        """Return what a stock config's `rope_parameters` say instead, for contexts up to `factor` * L tokens."""
        return {}

    def changes(self, factor: float) -> bool:
        """Tell if frequencies at this scale factor differ from the base's."""
        return factor > 1


def constant_table(inv_freq: Float[Tensor, " P"], t_grid: TGrid, method: str) -> FrequencyTable:
    """The same frequencies at every t."""
    t = as_grid(t_grid)
    return FrequencyTable(t, inv_freq.double().expand(len(t), -1).clone(), method=method)
