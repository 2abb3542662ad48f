"""Record of the rotation of cached keys: the spectrum and the position of each, carried by the cache object itself.

Requests therefore do not affect each other, and a copy of a cache stays valid. Methods of the cache that reorder its
rows reorder the record with them. Shapes: `B` batch, `S` cached tokens, `s` new tokens, `P` pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from clex_train.scaling.spectrum import Spectrum

ATTRIBUTE = "rotary_record"
# Positions arrive one per decoding step; concatenating now and then keeps `positions()` fast.
MAX_CHUNKS = 256
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
    record: KeyRecord | None = getattr(cache, ATTRIBUTE, None)
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


def count_tokens(num_new: int, position_ids: Tensor | None, record: KeyRecord | None) -> int:
    """Return n, the largest position of a call + 1: cached keys plus new tokens, without left padding."""
    if position_ids is None:
        return num_new + (record.num_keys if record else 0)
    if num_new == 1 and record is not None:
        # One more token per row; reading the largest position would synchronize in every decoding step.
        return record.num_tokens + 1
    # Left-padded rows have fewer positions than tokens, so the shape does not give n.
    first, last = (int(bound) for bound in torch.aminmax(position_ids))
    if first < 0:
        raise ValueError(f"position_ids={first}: positions start at 0; give padding position 0, not a negative one")
    return last + 1


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
