"""Rerotation of cached keys: when theta moves, each key is rotated once by the change of its angle.

    key_new = R(m * (theta_new - theta_old)) key_old

Rotations form a group, so this is exact, and free while t does not move. The spectrum and positions behind the keys
come from the cache's record (`key_record`).
Shapes: `B` batch, `H` key heads, `S` cached tokens, `D` head dim, `P` pairs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    QuantizedLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from clex_train.rope.key_rotations import KeyRecord
from clex_train.rope.preallocated_cache import PreallocatedLayer
from clex_train.scaling.spectrum import Spectrum, cos_sin, rotate

# Tokens rerotated at once in a preallocated cache, where a copy of a layer's keys may not fit.
TILE_LEN = 1024
# Their keys are not, or not only, in `layer.keys`, so rerotating `keys` would miss some. Up to 5.19 transformers has
# one kind of quantized layer, the one supported here.
UNSUPPORTED_LAYERS = (
    getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer),
    DynamicIndexedLayer,
    StaticIndexedLayer,
)


@torch.no_grad()
def rerotate_keys(
    cache: Cache,
    record: KeyRecord,
    spectrum: Spectrum,
    layout: str | None,
    scaled: Mapping[int, bool | None],
    part: str = "keys",
) -> None:
    """Rotate every key of the scaled layers from the record's spectrum to `spectrum`, and update the record.

    `layout` is the pairing of components. `scaled` maps a layer index to True if the scaled RoPE rotates its keys; None
    or a missing entry means unknown. `part` is the attribute of a cache layer with the rotated keys: latent attention
    caches them as `values`, beside a latent that does not rotate.

    Raises:
        ValueError: a cache or architecture whose keys cannot be rerotated, by name.
    """
    if record.matches(spectrum):
        return
    filled = {i: layer for i, layer in enumerate(cache.layers) if _has_keys(layer)}
    _refuse_unsupported(cache, layout, [i for i in filled if scaled.get(i) is None], part)
    assert layout is not None
    rerotation = _Rerotation(record, spectrum, layout)
    for index, layer in filled.items():
        if scaled[index]:
            _rerotate_layer(layer, rerotation, part)
    record.set_spectrum(spectrum)


def _has_keys(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.keys is not None


class _Rerotation:
    """Rotation between two spectra at every cached position, computed once per device for all layers."""

    def __init__(self, record: KeyRecord, spectrum: Spectrum, layout: str) -> None:
        self.positions, self.layout = record.positions(), layout
        # In float64: theta differences are small, and are multiplied by positions up to millions.
        self.delta = spectrum.inv_freq.detach().double().cpu() - record.inv_freq.double().cpu()
        self.factor = spectrum.attention_factor / record.attention_factor
        self._known: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def in_place(self, keys: Float[Tensor, "B H S D"], device: torch.device) -> None:
        """Rerotate all cached keys in place, by tiles on `device`, in memory that does not grow with the cache."""
        delta = self.delta.to(device)
        for first in range(0, keys.shape[2], TILE_LEN):
            tile = slice(first, first + TILE_LEN)
            angles = cos_sin(self.positions[:, tile].to(device), delta)
            keys[:, :, tile] = self._rotate(keys[:, :, tile].to(device), *angles).to(keys.device)

    def __call__(self, keys: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H S D"]:
        """Rerotate the last S cached keys in float32; components beyond the rotary part stay."""
        # A sliding-window layer holds fewer keys than the record has positions: the latest ones.
        cos, sin = (angles[:, -keys.shape[2] :] for angles in self._angles_on(keys.device))
        return self._rotate(keys, cos, sin)

    def _rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `keys` [B, H, S, D] by angles [B or 1, S, P]."""
        cos, sin = cos[:, None], sin[:, None]
        if cos.shape[0] not in (1, keys.shape[0]):
            raise ValueError(
                f"the KV cache has {keys.shape[0]} rows, but its keys were written by {cos.shape[0]}: "
                "change the number of rows only while t is constant"
            )
        width = 2 * cos.shape[-1]
        rotated = rotate(keys[..., :width].float(), cos, sin, self.layout)
        # YaRN's factor on cos and sin scales the keys as well.
        if self.factor != 1.0:
            rotated = rotated * self.factor
        return torch.cat((rotated.to(keys.dtype), keys[..., width:]), dim=-1)

    def _angles_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._known:
            self._known[device] = cos_sin(self.positions.to(device), self.delta.to(device))
        return self._known[device]


def _rerotate_layer(layer: Any, rerotation: _Rerotation, part: str) -> None:
    if isinstance(layer, QuantizedLayer):
        _rerotate_quantized(layer, rerotation)
        return
    keys: Tensor = getattr(layer, part)
    if keys.numel() == 0:
        return
    if isinstance(layer, StaticLayer):
        # A static layer must keep its address (CUDA graphs), and beyond the filled part it holds zeros.
        keys = keys[:, :, : min(int(layer.get_seq_length()), keys.shape[2])]
        keys.copy_(rerotation(keys))
    elif isinstance(layer, PreallocatedLayer):
        rerotation.in_place(keys, layer.device)
    else:
        setattr(layer, part, rerotation(keys))


def _rerotate_quantized(layer: Any, rerotation: _Rerotation) -> None:
    """Rerotate older and latest keys, and quantize the older ones again."""
    _reorder_quantized(layer)
    older = layer._dequantize(layer._quantized_keys)
    latest = [layer.keys] if layer.keys.dim() == 4 else []
    rotated = rerotation(torch.cat([older, *latest], dim=2))
    num_older = older.shape[2]
    # The layer itself requantizes every `residual_length` tokens, so this adds an error of the usual size.
    layer._quantized_keys = layer._quantize(rotated[:, :, :num_older].contiguous(), axis=layer.axis_key)
    if latest:
        layer.keys = rotated[:, :, num_older:]


def _reorder_quantized(layer: Any) -> None:
    """Apply a pending row order to older keys and values."""
    # Since 5.20 a quantized layer defers the reordering to its next update; rerotation needs it now.
    pending = getattr(layer, "_pending_beam_idx", None)
    if pending is None:
        return
    for name, axis in (("_quantized_keys", layer.axis_key), ("_quantized_values", layer.axis_value)):
        states = layer._dequantize(getattr(layer, name))
        setattr(layer, name, layer._quantize(states.index_select(0, pending.to(states.device)).contiguous(), axis=axis))
    layer._pending_beam_idx = None


def _refuse_unsupported(cache: Cache, layout: str | None, unknown: list[int], part: str) -> None:
    reason = _unsupported_reason(cache)
    if part != "keys" and any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        reason = f"quantized {part} cannot be rerotated"
    if reason is None and layout is None:
        reason = "the model's attention does not rotate the leading part of its keys in a known layout"
    if reason is None and unknown:
        reason = f"it is unknown whether layer {unknown[0]} of the model rotates its keys"
    if reason is not None:
        raise ValueError(
            f"cache={type(cache).__name__}: t moves while keys are cached, but {reason}; "
            "pin t with handle.pinned(t) or handle.fixed(num_tokens), or use a DynamicCache or StaticCache"
        )


def _unsupported_reason(cache: Cache) -> str | None:
    for layer in cache.layers:
        is_known = isinstance(layer, (DynamicLayer, StaticLayer)) or not isinstance(layer, CacheLayerMixin)
        if not is_known or (isinstance(layer, UNSUPPORTED_LAYERS) and not isinstance(layer, QuantizedLayer)):
            return f"keys in a {type(layer).__name__} cannot be rerotated in place"
    return "offloaded keys cannot be rerotated in place" if getattr(cache, "offloading", False) else None
