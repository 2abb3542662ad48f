"""Rerotation of cached keys: when theta moves, each key is rotated once by the change of its angle.

    key_new = R(m * (theta_new - theta_old)) key_old

Rotations form a group, so this is exact, and free while t does not move. The cache object carries the record of
spectrum and positions behind its keys, so requests do not affect each other and copies of a cache stay valid.
Shapes: `B` batch, `H` key heads, `S` cached tokens, `D` head dim, `P` pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
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

from clex_train.rope.preallocated_cache import PreallocatedLayer
from clex_train.scaling.spectrum import Spectrum, cos_sin, rotate

ATTRIBUTE = "rotary_record"
# Positions arrive one per decoding step; concatenating now and then keeps `positions()` fast.
MAX_CHUNKS = 256
# Tokens rerotated at once in a preallocated cache, where a copy of a layer's keys may not fit.
TILE_LEN = 1024
# Their keys are not, or not only, in `layer.keys`, so rerotating `keys` would miss some. Up to 5.19 transformers has
# one kind of quantized layer, the one supported here.
UNSUPPORTED_LAYERS = (
    getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer),
    DynamicIndexedLayer,
    StaticIndexedLayer,
)
ROW_METHODS: dict[str, Callable[[Any, int], Tensor]] = {
    "reorder_cache": lambda beam_idx, rows: beam_idx,
    "batch_select_indices": lambda indices, rows: torch.arange(rows)[torch.as_tensor(indices).cpu()],
    "batch_repeat_interleave": lambda repeats, rows: torch.arange(rows).repeat_interleave(repeats),
}
"""`Cache` methods that reorder rows: (argument, rows before) -> int64 [rows after], the former index of each row."""


@dataclass
class KeyRecord:
    """Record of the rotation of a cache's keys: one spectrum for all, and the position of each."""

    inv_freq: Float[Tensor, " P"]
    attention_factor: float
    num_tokens: int = 0
    """Largest position in the cache + 1; a left-padded batch has more keys than that."""
    chunks: list[Tensor] = field(default_factory=list)
    """Positions in the order of the keys, int64 [B or 1, s] each."""
    num_keys: int = 0
    """Number of positions in `chunks`, kept up to date because every decoding step reads it."""
    num_before_move: int | None = None
    """Number of keys before the last call, if t moved within its tokens; else None."""
    lost_candidates: bool = False
    """True if some tokens of such a call were kept and others cropped, as in assisted decoding."""

    def append(self, position_ids: Int[Tensor, "B s"], num_tokens: int) -> None:
        """Add the positions of new keys."""
        self.chunks.append(position_ids)
        self.num_keys += position_ids.shape[1]
        self.num_tokens = max(num_tokens, self.num_tokens)
        if len(self.chunks) > MAX_CHUNKS:
            self.chunks = [self.positions()]

    def positions(self) -> Int[Tensor, "B S"]:
        """Return the position of every key."""
        return torch.cat([chunk.expand(self.num_rows, -1) for chunk in self.chunks], dim=1)

    def trim(self, num_keys: int) -> None:
        """Remove keys that were cropped from the end of the cache."""
        if num_keys < self.num_keys:
            self.lost_candidates = self.num_before_move is not None and num_keys > self.num_before_move
            self.chunks = [self.positions()[:, :num_keys]] if num_keys else []
            self.num_tokens = int(self.chunks[0].max()) + 1 if num_keys else 0
            self.num_keys = num_keys

    def reorder_rows(self, which: Int[Tensor, " B"], may_lose_rows: bool = True) -> None:
        """Set row i to the former row `which[i]`; not for a record whose rows share their positions.

        With `may_lose_rows=False` (beam search, which keeps one beam of each request) `num_tokens` is unchanged.
        """
        positions = self.positions()
        self.chunks = [positions[which.to(positions.device)]]
        # Reading the largest position synchronizes, which a beam search would do at every step.
        if may_lose_rows:
            # Reading the largest position waits for the device, which every step of a beam search would do.
            self.num_tokens = int(self.chunks[0].max()) + 1

    @property
    def num_rows(self) -> int:
        """Number of rows with positions of their own; 1 where all rows share them."""
        return max((chunk.shape[0] for chunk in self.chunks), default=1)

    def matches(self, spectrum: Spectrum) -> bool:
        """Return True if the keys need no rerotation for `spectrum`."""
        own, other = self.inv_freq, spectrum.inv_freq.detach()
        # Identity first: decoding at one t compares the same object, without touching the device.
        same = own is spectrum.inv_freq or torch.equal(own.double().cpu(), other.double().cpu())
        return same and self.attention_factor == spectrum.attention_factor

    def set_spectrum(self, spectrum: Spectrum) -> None:
        """Declare the keys to be at `spectrum`."""
        theta = spectrum.inv_freq
        # Detached, so that a cache does not keep the graph of a training step alive.
        self.inv_freq = theta.detach() if theta.requires_grad else theta
        self.attention_factor = spectrum.attention_factor


def num_cached(cache: Cache | None) -> int:
    """Count the keys that the cache has seen, including those that a sliding window has dropped."""
    return 0 if cache is None else int(cache.get_seq_length())


def find_record(cache: Cache | None) -> KeyRecord | None:
    """Return the record of a cache that holds keys, trimmed to them; None for an empty cache.

    Raises:
        ValueError: the cache was filled without a handle, so the rotation of its keys is unknown.
    """
    length = num_cached(cache)
    if length == 0:
        return None
    record = getattr(cache, ATTRIBUTE, None)
    if record is None or record.num_keys < length:
        raise ValueError(
            f"the KV cache holds {length} keys of unknown rotation; fill the cache through the model after "
            "install_rotary, or start from an empty one"
        )
    record.trim(length)
    return record


def record_keys(
    cache: Cache,
    record: KeyRecord | None,
    spectrum: Spectrum,
    position_ids: Int[Tensor, "B s"],
    num_tokens: int,
    moved: bool = False,
) -> None:
    """Record on the cache that keys at `position_ids` were added at `spectrum`; `record` is None for the first ones.

    `moved` is True if the first of them, fed alone, would have used another spectrum.
    """
    if record is None:
        record = KeyRecord(spectrum.inv_freq, spectrum.attention_factor)
        record.set_spectrum(spectrum)
    record.num_before_move = record.num_keys if moved else None
    record.append(position_ids, num_tokens)
    setattr(cache, ATTRIBUTE, record)
    if not isinstance(cache, _RecordedCache):
        # A changed class, not methods set on the instance: those would form a reference cycle and keep the keys in
        # memory until the garbage collector runs.
        cache.__class__ = _recorded_class(type(cache))


class _RecordedCache:
    """Mixin for a recorded cache: methods that reorder rows reorder the recorded positions too.

    The instance changes its class.
    """

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """Set row i to the former row beam_idx[i]."""
        self._move_rows("reorder_cache", args, kwargs)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """Keep the rows of `indices`."""
        self._move_rows("batch_select_indices", args, kwargs)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """Repeat every row `repeats` times."""
        self._move_rows("batch_repeat_interleave", args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the library's class."""
        # The derived class exists in no module, so pickle could not find it by name.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_empty_cache, (type(self).__bases__[1],), *reduced[2:])

    def _move_rows(self: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        getattr(super(), name)(*args, **kwargs)
        record: KeyRecord | None = getattr(self, ATTRIBUTE, None)
        if record is None or record.num_rows == 1:
            return
        record.trim(num_cached(self))
        [argument] = (*args, *kwargs.values())
        record.reorder_rows(ROW_METHODS[name](argument, record.num_rows), may_lose_rows=name != "reorder_cache")


def _recorded_class(kind: type) -> type:
    """Derive the class of recorded caches from `kind`, once, under the name of `kind` for messages."""
    # Looked up instead of cached in a dict: subclasses are weakly referenced, and there is no global state.
    derived: list[type] = kind.__subclasses__()
    known = next((each for each in derived if _RecordedCache in each.__bases__), None)
    if known is not None:
        return known
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_RecordedCache, kind), names)


def _empty_cache(kind: type) -> Any:
    """Create a recorded cache of `kind` without its state."""
    recorded: Any = _recorded_class(kind)
    return recorded.__new__(recorded)


@torch.no_grad()
def rerotate_keys(
    cache: Cache, record: KeyRecord, spectrum: Spectrum, layout: str | None, scaled: Mapping[int, bool | None]
) -> None:
    """Rotate every key of the scaled layers from the record's spectrum to `spectrum`, and update the record.

    `layout` is the pairing of components. `scaled` tells by layer index whether the scaled RoPE rotates its keys; None
    or a missing entry means unknown.

    Raises:
        ValueError: a cache or architecture whose keys cannot be rerotated, by name.
    """
    if record.matches(spectrum):
        return
    filled = {i: layer for i, layer in enumerate(cache.layers) if _has_keys(layer)}
    _refuse_unsupported(cache, layout, [i for i in filled if scaled.get(i) is None])
    assert layout is not None
    rerotation = _Rerotation(record, spectrum, layout)
    for index, layer in filled.items():
        if scaled[index]:
            _rerotate_layer(layer, rerotation)
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
                "change the number of rows only while t stands still"
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


def _rerotate_layer(layer: Any, rerotation: _Rerotation) -> None:
    if isinstance(layer, QuantizedLayer):
        _rerotate_quantized(layer, rerotation)
    elif layer.keys.numel() == 0:
        return
    elif isinstance(layer, StaticLayer):
        # A static layer must keep its address (CUDA graphs), and beyond the filled part it holds zeros.
        filled = min(int(layer.get_seq_length()), layer.keys.shape[2])
        keys = layer.keys[:, :, :filled]
        keys.copy_(rerotation(keys))
    elif isinstance(layer, PreallocatedLayer):
        rerotation.in_place(layer.keys, layer.device)
    else:
        layer.keys = rerotation(layer.keys)


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


def _refuse_unsupported(cache: Cache, layout: str | None, unknown: list[int]) -> None:
    reason = _unsupported_reason(cache)
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
