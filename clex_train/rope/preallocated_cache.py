"""A KV cache that grows in place: room for all keys and values is set aside once, on the device or on the host.

`torch.cat`, by which a DynamicCache grows, needs a layer's keys twice for a moment, and leaves holes behind it.
Memory of the host is claimed page by page as it is written, so room that is not reached costs nothing there, unless it
is pinned: that is claimed at once, each layer's keys and values in a block of a power of two.
Shapes: `B` batch, `H` key heads, `S` new tokens, `T` all so far, `D` head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def new_cache(model: Any, capacity: int, on_host: bool = False) -> DynamicCache:
    """An empty cache for `capacity` tokens of a causal LM of transformers.

    Layers with a sliding window keep their own kind, whose size is bounded. `on_host` keeps the others in host memory:
    one layer at a time visits the device. Where the model is on the CPU that is no difference.
    """
    cache = DynamicCache(config=model.config)
    kind = HostLayer if on_host else PreallocatedLayer
    cache.layers = [kind(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """One layer whose `keys` and `values` are the filled part of buffers [B, H, capacity, D]."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the room aside, of the dtype of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [self._empty(states, states) for states in (key_states, value_states)]
        self._fill(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values [B, H, S, D]; all so far [B, H, T, D]. `ValueError` beyond the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled, num_tokens = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if num_tokens > self.capacity:
            raise ValueError(f"num_tokens={num_tokens}: the cache was made for {self.capacity} tokens")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, filled:num_tokens] = states
        self._fill(num_tokens)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        num_tokens = self.keys.shape[2]
        self._buffers = [self._copy(buffer, function(buffer[:, :, :num_tokens])) for buffer in self._buffers]
        self._fill(num_tokens)

    def _copy(self, before: Tensor, states: Tensor) -> Tensor:
        """Put `states` into a buffer of their own, in the kind of memory that `before` is in."""
        buffer = self._empty(states, before)
        buffer[:, :, : states.shape[2]] = states
        return buffer

    def _empty(self, states: Tensor, source: Tensor) -> Tensor:
        """Set room aside for the rows of `states`; `source` is what came from there, or is there now."""
        return states.new_empty(states.shape[0], states.shape[1], self.capacity, states.shape[3])

    def _fill(self, num_tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :num_tokens] for buffer in self._buffers)


class HostLayer(PreallocatedLayer):
    """One layer in host memory, pinned where there is a GPU; `update` returns copies on the device of its arguments."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values [B, H, S, D]; a copy on their device of all so far [B, H, T, D]."""
        device = key_states.device
        # Laid out as the buffers are, so that each way is one copy of one block of memory.
        laid_out = (_by_token(states).contiguous() for states in (key_states, value_states))
        keys, values = super().update(*map(_by_head, laid_out), *args, **kwargs)
        return keys.to(device), values.to(device)

    def _empty(self, states: Tensor, source: Tensor) -> Tensor:
        shape = (self.capacity, states.shape[0], states.shape[1], states.shape[3])
        # Rows that were selected from pinned memory are in memory that is not.
        pinned = source.is_cuda or source.is_pinned()
        return _by_head(torch.empty(shape, dtype=states.dtype, device="cpu", pin_memory=pinned))


def _by_token(states: Tensor) -> Tensor:
    """[B, H, S, D] as [S, B, H, D]."""
    return states.permute(2, 0, 1, 3)


def _by_head(states: Tensor) -> Tensor:
    """[S, B, H, D] as [B, H, S, D]."""
    return states.permute(1, 2, 0, 3)
