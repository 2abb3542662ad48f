"""Replacement for a model's `*RotaryEmbedding`: cos and sin of the current spectrum.

    cos, sin = attention_factor * cos(m theta), attention_factor * sin(m theta)

Attention that multiplies complex numbers gets cos + i sin. It differs from the stock module in five ways: the phase
stays accurate at long positions, gradients reach the frequencies, sampled positions replace `position_ids` in training,
nothing is cached between calls, and layers with a short window keep the model's own frequencies.
Shapes: `B` batch, `S` sequence, `P` pairs = rotary_dim / 2, `W` width of cos that the model expects.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Complex, Float, Num
from torch import Tensor, nn

from clex_train.scaling.spectrum import Spectrum, cos_sin

LayerType = str | None
Embeddings = tuple[Tensor, ...]
"""cos and sin, or for POLAR one tensor cos + i sin."""

POLAR = "polar"

EXPANSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "twice": lambda angles: torch.cat((angles, angles), dim=-1),
    "each_twice": lambda angles: angles.repeat_interleave(2, dim=-1),
    "once": lambda angles: angles,
    POLAR: lambda angles: angles,
}
"""Layouts of the angles of P pairs in the cos and sin that a model's attention expects."""


class ScaledRotary(nn.Module):
    """Replaces one rotary module; has no parameters and no buffers.

    `base` holds the model's own spectrum for each layer type (key None for a model with one RoPE). The layer type
    `scaled` follows `spectrum`; local layers keep their own RoPE and plain positions. `expansion` is a key of
    `EXPANSIONS`; `casts` is True if the stock module rounds to the dtype of `x`.
    """

    def __init__(self, base: Mapping[LayerType, Spectrum], scaled: LayerType, expansion: str, casts: bool) -> None:
        super().__init__()
        # Plain attributes, not buffers: an engine that casts the model to bfloat16 must not round the frequencies.
        # The model's own attention factor applies to whatever spectrum is set.
        self.own_factor = {layer_type: spectrum.attention_factor for layer_type, spectrum in base.items()}
        self.base = {layer_type: replace(spectrum, attention_factor=1.0) for layer_type, spectrum in base.items()}
        self.scaled = scaled
        self.spectrum = self.base[scaled]
        self.positions: Tensor | None = None
        self.last_position_ids: Tensor | None = None
        self.expansion, self.casts = expansion, casts
        # True once every decoder layer has a casting hook; until then this module rounds like the stock one.
        self.layers_cast = False
        # Layers that keep the model's own frequencies although all layers share one RoPE.
        self.local_layers: frozenset[int] = frozenset()
        self._on_device: dict[tuple[LayerType, bool], tuple[Spectrum, Tensor]] = {}

    def forward(
        self, x: Float[Tensor, "B ..."], position_ids: Num[Tensor, "*G #B S"], layer_type: str | None = None
    ) -> tuple[Num[Tensor, "#B S W"], ...] | Complex[Tensor, "#B S W"]:
        """Compute cos and sin, in the dtype of `x`, or in float32 while training (each layer then casts its own).

        With `local_layers` the pair of the model's own frequencies follows (see `hooks.SelectPositionEmbeddings`).

        Raises:
            ValueError: sampled positions do not fit the batch, or `position_ids` are not integers or not of a text.
        """
        if position_ids.is_floating_point():
            raise ValueError(f"position_ids of {position_ids.dtype}: pass sampled positions to handle.training()")
        position_ids = _positions_of_text(position_ids)
        # Models derive positions from masks and caches in ways of their own; this is where they become known.
        self.last_position_ids = position_ids
        if layer_type != self.scaled:
            found = self._embeddings(x, position_ids, self.base[layer_type], layer_type)
        else:
            positions = self._effective_positions(x.shape[0], position_ids)
            found = self._embeddings(x, positions, self.spectrum, layer_type)
            if self.local_layers:
                found = (*found, *self._embeddings(x, position_ids, self.base[layer_type], layer_type))
        # Attention that multiplies complex numbers expects a tensor, not a tuple of one.
        return found[0] if len(found) == 1 else found

    def _embeddings(self, x: Tensor, positions: Tensor, spectrum: Spectrum, layer_type: LayerType) -> Embeddings:
        cos, sin = cos_sin(positions, self._inv_freq_on(spectrum, layer_type, x.device))
        expand, factor = EXPANSIONS[self.expansion], spectrum.attention_factor * self.own_factor[layer_type]
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        if self.expansion == POLAR:
            return (torch.complex(cos, sin),)
        # Rounding here would sum the gradients of all layers in bfloat16; a cast per layer sums them in float32.
        rounds = self.casts and not (self.layers_cast and cos.requires_grad)
        dtype = x.dtype if rounds else torch.float32
        return expand(cos).to(dtype), expand(sin).to(dtype)

    def _effective_positions(self, num_rows: int, position_ids: Tensor) -> Tensor:
        if self.positions is None:
            return position_ids
        expected = (num_rows, position_ids.shape[-1])
        if self.positions.shape != expected:
            raise ValueError(
                f"positions of shape {tuple(self.positions.shape)}: "
                f"the batch has {expected[0]} rows of {expected[1]} tokens"
            )
        return self.positions.to(position_ids.device)

    def _inv_freq_on(self, spectrum: Spectrum, layer_type: LayerType, device: torch.device) -> Tensor:
        """Return the frequencies on the device of the activations, copied once per spectrum."""
        # With a gradient the copy is part of the graph, so each call needs its own.
        if spectrum.inv_freq.device == device or spectrum.inv_freq.requires_grad:
            return spectrum.inv_freq.to(device)
        key = (layer_type, spectrum is self.base[layer_type])
        known = self._on_device.get(key)
        if known is None or known[0] is not spectrum or known[1].device != device:
            known = self._on_device[key] = (spectrum, spectrum.inv_freq.to(device))
        return known[1]

    def extra_repr(self) -> str:
        return f"pairs={len(self.spectrum.inv_freq)}, t={self.spectrum.t:g}, expansion={self.expansion}"


def _positions_of_text(position_ids: Tensor) -> Tensor:
    """Return positions [B, S]; `ValueError` for those of images, which have several coordinates."""
    if position_ids.dim() == 2:
        return position_ids
    # Families that also read images pass time, height and width [3, B, S], which are equal for a text. An expanded
    # tensor repeats one of them; comparing values would synchronize.
    if position_ids.stride(0) != 0 and not torch.equal(position_ids, position_ids[:1].expand_as(position_ids)):
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} with several coordinates: text only")
    return position_ids[0]


def require_usable(positions: Tensor) -> None:
    """Raise `ValueError` unless sampled positions are finite and at least 0."""
    wrong = positions[~((positions >= 0) & (positions < float("inf")))]
    if len(wrong):
        raise ValueError(f"positions={float(wrong[0]):g}: sampled positions must be finite and at least 0")
