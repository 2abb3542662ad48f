"""Cached keys that follow the spectrum: when theta moves, each key is turned once by what its angle has changed.

    key_new = R(m * (theta_new - theta_old)) key_old

Rotations form a group, so this is exact, and between two changes of t it costs nothing. The cache object itself carries
the record of the spectrum and positions its keys were rotated at, so requests do not influence each other and a
copy of a cache knows what it holds. Shapes: `B` batch, `H` key heads, `S` cached tokens, `D` head width, `P` pairs.
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
MAX_CHUNKS = 256
TILE_LEN = 1024
# Their keys are not in `layer.keys`, or not only there, so that turning `keys` would miss some. Up to 5.19 transformers
# has one kind of quantised layer, the one that is known here.
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
"""Methods of a `Cache` that move its rows: (argument, rows before) -> int64 [rows after], which row each one was."""


@dataclass
class KeyRecord:
    """Record of how a cache's keys were rotated: one spectrum for all, and the position of each."""

    inv_freq: Float[Tensor, " P"]
    attention_factor: float
    num_tokens: int = 0
    """Largest position in the cache + 1; the keys of a left-padded batch are more."""
    chunks: list[Tensor] = field(default_factory=list)
    """int64 [B or 1, s] in the order of the keys."""
    num_keys: int = 0
    """Keys whose positions are in `chunks`; counted along, since every decoding step asks."""
    num_before_move: int | None = None
    """Keys before the last call, if t moved within its tokens; None if it did not."""
    lost_candidates: bool = False
    """Whether some tokens of such a call were kept and others taken back, as assisted decoding does."""

    def append(self, position_ids: Int[Tensor, "B s"], num_tokens: int) -> None:
        """Note the positions of keys that were added."""
        self.chunks.append(position_ids)
        self.num_keys += position_ids.shape[1]
        self.num_tokens = max(num_tokens, self.num_tokens)
        if len(self.chunks) > MAX_CHUNKS:
            self.chunks = [self.positions()]

    def positions(self) -> Int[Tensor, "B S"]:
        """Return the position of every key."""
        return torch.cat([chunk.expand(self.num_rows, -1) for chunk in self.chunks], dim=1)

    def trim(self, num_keys: int) -> None:
        """Forget the keys that were cropped from the end."""
        if num_keys < self.num_keys:
            self.lost_candidates = self.num_before_move is not None and num_keys > self.num_before_move
            self.chunks = [self.positions()[:, :num_keys]] if num_keys else []
            self.num_tokens = int(self.chunks[0].max()) + 1 if num_keys else 0
            self.num_keys = num_keys

    def reorder_rows(self, which: Int[Tensor, " B"], may_lose_rows: bool = True) -> None:
        """Let row i be what row `which[i]` was; not for rows that all have the same positions.

        Beams change places within their request, of which one stays: unless `may_lose_rows`, `num_tokens` is kept.
        """
        positions = self.positions()
        self.chunks = [positions[which.to(positions.device)]]
        if may_lose_rows:
            # Reading the largest position waits for the device, which every step of a beam search would do.
            self.num_tokens = int(self.chunks[0].max()) + 1

    @property
    def num_rows(self) -> int:
        """Count rows whose positions are told apart; 1 where all have the same."""
        return max((chunk.shape[0] for chunk in self.chunks), default=1)

    def matches(self, spectrum: Spectrum) -> bool:
        """Tell whether the keys need no turning for `spectrum`."""
        own, other = self.inv_freq, spectrum.inv_freq.detach()
        same = own is spectrum.inv_freq or torch.equal(own.double().cpu(), other.double().cpu())
        return same and self.attention_factor == spectrum.attention_factor

    def set_spectrum(self, spectrum: Spectrum) -> None:
        """Declare the keys to be at `spectrum`."""
        theta = spectrum.inv_freq
        self.inv_freq = theta.detach() if theta.requires_grad else theta
        self.attention_factor = spectrum.attention_factor


def num_cached(cache: Cache | None) -> int:
    """Count keys that the cache has seen (of which a sliding window may have dropped some)."""
    return 0 if cache is None else int(cache.get_seq_length())


def find_record(cache: Cache | None) -> KeyRecord | None:
    """Return the record of a cache that holds keys, trimmed to them; None for an empty one.

    `ValueError` for keys that were put there while no handle was watching: nothing says what they are rotated by.
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
    """Record on the cache that the keys at `position_ids` were added at `spectrum`; `record` is None for the first.

    `moved` says that the first of them, alone, would have been added at another spectrum.
    """
    if record is None:
        record = KeyRecord(spectrum.inv_freq, spectrum.attention_factor)
        record.set_spectrum(spectrum)
    record.num_before_move = record.num_keys if moved else None
    record.append(position_ids, num_tokens)
    setattr(cache, ATTRIBUTE, record)
    if not isinstance(cache, _RecordedCache):
        cache.__class__ = _recorded_class(type(cache))


class _RecordedCache:
    """Mixin for the class of one cache: a method that moves rows moves the positions in the record with them.

    The instance changes its class. Methods that were set on it would refer back to it, and keep its keys in memory
    until the garbage collector looks for cycles.
    """

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """Let row i be what row beam_idx[i] was."""
        self._move_rows("reorder_cache", args, kwargs)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """Keep the rows of `indices`."""
        self._move_rows("batch_select_indices", args, kwargs)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """Repeat every row `repeats` times."""
        self._move_rows("batch_repeat_interleave", args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as an instance of the class in the library, which has a name to be found by."""
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
    """Derive the class of recorded caches of `kind` once, under the name of `kind`, which messages show."""
    derived: list[type] = kind.__subclasses__()
    known = next((each for each in derived if _RecordedCache in each.__bases__), None)
    if known is not None:
        return known
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_RecordedCache, kind), names)


def _empty_cache(kind: type) -> Any:
    """Make a recorded cache of `kind` without its state."""
    recorded: Any = _recorded_class(kind)
    return recorded.__new__(recorded)


@torch.no_grad()
def rerotate_keys(
    cache: Cache, record: KeyRecord, spectrum: Spectrum, layout: str | None, scaled: Mapping[int, bool | None]
) -> None:
    """Bring every key of the scaled layers from the record's spectrum to `spectrum`, and the record with them.

    `layout` is how components pair up; `scaled` says by layer whether its keys are rotated by the scaled RoPE, None or
    no entry where that is not known. `ValueError` names a cache or an architecture whose keys cannot be turned.
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
    """The rotation between two spectra for every cached position, formed once for all layers of a device."""

    def __init__(self, record: KeyRecord, spectrum: Spectrum, layout: str) -> None:
        self.positions, self.layout = record.positions(), layout
        self.delta = spectrum.inv_freq.detach().double().cpu() - record.inv_freq.double().cpu()
        self.factor = spectrum.attention_factor / record.attention_factor
        self._known: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def in_place(self, keys: Float[Tensor, "B H S D"], device: torch.device) -> None:
        """Turn all cached keys where they are, by tiles on `device`: what that forms does not grow with the cache."""
        delta = self.delta.to(device)
        for first in range(0, keys.shape[2], TILE_LEN):
            tile = slice(first, first + TILE_LEN)
            angles = cos_sin(self.positions[:, tile].to(device), delta)
            keys[:, :, tile] = self._rotate(keys[:, :, tile].to(device), *angles).to(keys.device)

    def __call__(self, keys: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H S D"]:
        """Turn the last S cached keys in float32; components beyond the rotary part stay."""
        cos, sin = (angles[:, -keys.shape[2] :] for angles in self._angles_on(keys.device))
        return self._rotate(keys, cos, sin)

    def _rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`keys` [B, H, S, D] by angles [B or 1, S, P]."""
        cos, sin = cos[:, None], sin[:, None]
        if cos.shape[0] not in (1, keys.shape[0]):
            raise ValueError(
                f"the KV cache has {keys.shape[0]} rows, but its keys were written by {cos.shape[0]}: "
                "change the number of rows only while t stands still"
            )
        width = 2 * cos.shape[-1]
        rotated = rotate(keys[..., :width].float(), cos, sin, self.layout)
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
        # A static layer keeps its address, and what it has beyond the filled part is zero.
        filled = min(int(layer.get_seq_length()), layer.keys.shape[2])
        keys = layer.keys[:, :, :filled]
        keys.copy_(rerotation(keys))
    elif isinstance(layer, PreallocatedLayer):
        rerotation.in_place(layer.keys, layer.device)
    else:
        layer.keys = rerotation(layer.keys)


def _rerotate_quantized(layer: Any, rerotation: _Rerotation) -> None:
    """Quantise older keys again, as the layer does by itself every `residual_length` tokens."""
    _reorder_quantized(layer)
    older = layer._dequantize(layer._quantized_keys)
    latest = [layer.keys] if layer.keys.dim() == 4 else []
    rotated = rerotation(torch.cat([older, *latest], dim=2))
    num_older = older.shape[2]
    layer._quantized_keys = layer._quantize(rotated[:, :, :num_older].contiguous(), axis=layer.axis_key)
    if latest:
        layer.keys = rotated[:, :, num_older:]


def _reorder_quantized(layer: Any) -> None:
    """Move the rows of older keys and values now: from 5.20 on a layer puts that off until its next update."""
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
        reason = f"unknown whether layer {unknown[0]} of the model rotates its keys"
    if reason is not None:
        raise ValueError(
            f"cache={type(cache).__name__}: t moves while keys are cached, and {reason}; "
            "pin t with handle.pinned(t) or handle.fixed(num_tokens), or use a DynamicCache or StaticCache"
        )


def _unsupported_reason(cache: Cache) -> str | None:
    for layer in cache.layers:
        is_known = isinstance(layer, (DynamicLayer, StaticLayer)) or not isinstance(layer, CacheLayerMixin)
        if not is_known or (isinstance(layer, UNSUPPORTED_LAYERS) and not isinstance(layer, QuantizedLayer)):
            return f"keys in a {type(layer).__name__} cannot be turned in place"
    return "keys that are offloaded cannot be turned in place" if getattr(cache, "offloading", False) else None
