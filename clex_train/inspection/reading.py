"""Result of an inspection: what a saved model loads at one length."""

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from clex_train.inspection.engines.verdict import Verdict
from clex_train.inspection.facts import FieldFacts
from clex_train.inspection.layers import Layer
from clex_train.inspection.spectra import LayerRope
from clex_train.model_config.context_length import ContextLength
from clex_train.scaling.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Field:
    """CLEX field of a directory at one length."""

    spectrum: Spectrum
    """Frequencies and attention factor at the t of the length."""
    scaled: str | None
    """Layer type that it scales; the others keep their own frequencies."""
    t_max: float
    facts: FieldFacts


@dataclass(frozen=True, eq=False)
class Reading:
    """What a saved model loads."""

    name: str
    model_type: str
    architecture: str
    length: int
    """Tokens of the sequence that frequencies are read for."""
    length_source: str
    context_len: ContextLength | None
    """L, which plain RoPE was trained on; None if nothing states it."""
    ropes: tuple[LayerRope, ...]
    layers: tuple[Layer, ...]
    field: Field | None
    verdicts: tuple[Verdict, ...]

    def inv_freq(self, rope: LayerRope) -> Float64[Tensor, " P"]:
        """Return the frequencies that this project uses: the field's, or those of config.json."""
        return self.field.spectrum.inv_freq if self.field and self.scales(rope) else rope.inv_freq

    def attention_factor(self, rope: LayerRope) -> float:
        """Return the factor of cos and sin that this project uses."""
        return self.field.spectrum.attention_factor if self.field and self.scales(rope) else rope.attention_factor

    def scales(self, rope: LayerRope) -> bool:
        """Return True if the CLEX field scales these layers."""
        return self.field is not None and rope.name == self.field.scaled
