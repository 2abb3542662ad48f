"""A KV cache that is allocated once at full size, on the device or on the host.

A DynamicCache grows by `torch.cat`, which briefly needs a layer's keys twice and fragments memory. Host memory is
claimed page by page as it is written, so unused capacity costs nothing there. Pinned memory is the exception: it is
claimed at once, and each buffer is rounded up to a power of two.
Shapes: `B` batch, `H` key heads, `S` new tokens, `T` all tokens so far, `D` head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def new_cache(model: Any, capacity: int, on_host: bool = False) -> DynamicCache:
    """Create an empty cache for `capacity` tokens of a Hugging Face causal LM.

    `on_host` keeps the keys in host memory and copies one layer at a time to the device; no difference for a model on
    the CPU.
    """
    cache = DynamicCache(config=model.config)
    kind = HostLayer if on_host else PreallocatedLayer
    # Sliding-window layers are bounded already. The exact type: subclasses store keys in ways of their own.
    cache.layers = [kind(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # mypy does not follow transformers
    """A layer whose `keys` and `values` are views of the filled part of buffers [B, H, capacity, D]."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in the dtype of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [self._empty(states, states) for states in (key_states, value_states)]
        self._fill(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, S, D]; return all so far [B, H, T, D]. `ValueError` beyond the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled, num_tokens = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if num_tokens > self.capacity:
            raise ValueError(f"num_tokens={num_tokens}: the cache was allocated for {self.capacity} tokens")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, filled:num_tokens] = states
        self._fill(num_tokens)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Set row i to the former row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        num_tokens = self.keys.shape[2]
        self._buffers = [self._copy(buffer, function(buffer[:, :, :num_tokens])) for buffer in self._buffers]
        self._fill(num_tokens)

    def _copy(self, before: Tensor, states: Tensor) -> Tensor:
        """Copy `states` into a new buffer, in the kind of memory that `before` is in."""
        # The number of rows may change, so the old buffer cannot be reused.
        buffer = self._empty(states, before)
        buffer[:, :, : states.shape[2]] = states
        return buffer

    def _empty(self, states: Tensor, source: Tensor) -> Tensor:
        """Allocate a buffer for the rows of `states`; `source` determines the kind of memory."""
        return states.new_empty(states.shape[0], states.shape[1], self.capacity, states.shape[3])

    def _fill(self, num_tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :num_tokens] for buffer in self._buffers)


class HostLayer(PreallocatedLayer):
    """A layer in host memory, pinned if there is a GPU; `update` returns copies on the device of its arguments."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, S, D]; return device copies of all so far [B, H, T, D]."""
        device = key_states.device
        # Same layout as the buffers, so that each transfer is one contiguous copy.
        laid_out = (_by_token(states).contiguous() for states in (key_states, value_states))
        keys, values = super().update(*map(_by_head, laid_out), *args, **kwargs)
        return keys.to(device), values.to(device)

    def _empty(self, states: Tensor, source: Tensor) -> Tensor:
        # Tokens first: the filled part is then one contiguous block, whatever the number of heads.
        shape = (self.capacity, states.shape[0], states.shape[1], states.shape[3])
        # Rows selected from pinned memory land in pageable memory, so check the old buffer, not the selection.
        pinned = source.is_cuda or source.is_pinned()
        return _by_head(torch.empty(shape, dtype=states.dtype, device="cpu", pin_memory=pinned))


def _by_token(states: Tensor) -> Tensor:
    """View [B, H, S, D] as [S, B, H, D]."""
    return states.permute(2, 0, 1, 3)


def _by_head(states: Tensor) -> Tensor:
    """View [S, B, H, D] as [B, H, S, D]."""
    return states.permute(1, 2, 0, 3)
