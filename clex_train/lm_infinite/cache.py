"""A KV cache of constant size for unbounded streams: per layer the G starting tokens and the L - 1 latest ones.

Keys are stored unrotated, so nothing in the cache depends on the length of the stream. The buffer has some slots beyond
L - 1; only when they are used up is it moved to its beginning, so a decoding step copies one token. A second buffer
keeps the keys rotated by their slot.
Shapes: `B` batch, `K` key heads, `S` new tokens, `D` head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from clex_train.attention.padding import gather_tokens, left_pad_order
from clex_train.lm_infinite.rotation import TableRotation
from clex_train.lm_infinite.stream import KeyValues, RotatedKeys, Stream

# Moving L - 1 tokens every L / 8 steps rotates about eight keys per step, and rounding never accumulates.
MIN_SPARE_SLOTS = 16


def spare_slots(n_local: int) -> int:
    """Return the number of slots in a buffer beyond L - 1."""
    return max(MIN_SPARE_SLOTS, n_local // 8)


class LambdaCache(Cache):  # type: ignore[misc]  # mypy does not follow transformers
    """A KV cache for a model after `apply_lm_infinite`; created by `LmInfinite.new_cache`."""

    def __init__(self, layers: list["LambdaCacheLayer"]) -> None:
        super().__init__(layers=list(layers))


class LambdaCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # mypy does not follow transformers
    """Cache of one layer: the starting tokens, and a window of the keys that new queries can reach."""

    # transformers' mask code treats sliding layers specially; padding masks here span the whole stream.
    is_sliding = False

    def __init__(self, n_local: int, n_global: int) -> None:
        super().__init__()
        self.n_local, self.n_global = n_local, n_global
        self.num_tokens = 0
        self.num_padding: Tensor | None = None
        """Padding tokens seen so far, int64 [B]; None for none."""
        self.start: KeyValues | None = None
        self._is_expected = False
        self._incoming: Tensor | None = None
        self._filled = 0
        self._most_padding = 0
        self._first_slot: int | None = None
        self._rotated: Tensor | None = None
        self._num_rotated = 0
        self._rotated_by: Tensor | None = None

    @property
    def stream(self) -> Stream:
        """State of the stream after the last update."""
        return Stream(self.num_tokens, self.num_padding)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate an empty window in the dtype and on the device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self.n_local - 1 + spare_slots(self.n_local)
        # Inference tensors cannot be written to outside inference mode, and a cache may outlive it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                x.new_empty(x.shape[0], x.shape[1], capacity, x.shape[3]) for x in (key_states, value_states)
            )
        self.is_initialized = True

    def expect(self, num_rows: int, valid: Bool[Tensor, "B S"] | None) -> None:
        """Announce an `update` by Lambda attention: its number of rows, and which tokens are valid (None: all).

        Raises:
            ValueError: the cache holds another number of rows.
        """
        if self.is_initialized and num_rows != len(self._window.keys):
            raise ValueError(
                f"cache=LambdaCache: it holds {len(self._window.keys)} rows, the call has {num_rows}; take "
                "new_cache(), or change its rows by batch_repeat_interleave or batch_select_indices"
            )
        self._is_expected, self._incoming = True, valid

    def update(
        self, key_states: Float[Tensor, "B K S D"], value_states: Float[Tensor, "B K S V"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "B K T D"], Float[Tensor, "B K T V"]]:
        """Add new tokens; return all unrotated keys and values that the window of one of them reaches.

        Padding among them is moved to the front of each row. The starting tokens are in `start`.

        Raises:
            ValueError: the call was not announced by `expect`, so another attention would take the window for all keys.
        """
        if not self._is_expected:
            raise ValueError(
                "cache=LambdaCache: lm_infinite is not applied to this model (or was undone), so its attention "
                "needs all keys; leave the cache out, or call apply_lm_infinite first"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, valid = KeyValues(key_states, value_states), self._incoming
        self._is_expected, self._incoming = False, None
        # One synchronization here saves the slow path for batches whose padding is all in the past.
        if valid is not None and bool(valid.all()):
            valid = None
        num_new, capacity = key_states.shape[2], self._window.keys.shape[2]
        wants_gradient = torch.is_grad_enabled() and key_states.requires_grad
        # With gradients, a write into the buffer would corrupt tensors that autograd saved.
        if wants_gradient or valid is not None or num_new > capacity:
            return self._extend(new, valid)
        if self._filled + num_new > capacity:
            self._move_to_beginning(min(self._filled, self.n_local - 1))
        if self._filled + num_new > capacity:
            return self._extend(new, None)
        for buffer, states in zip(self._window, new, strict=True):
            buffer[:, :, self._filled : self._filled + num_new] = states
        # The new tokens reach L - 1 keys back from the first of them.
        self._first_slot = max(0, self._filled - self.n_local + 1)
        self._filled += num_new
        window = self._window.span(self._first_slot, self._filled)
        self._count(window, num_new, None)
        return window

    def rotated_window(self, rotation: TableRotation) -> RotatedKeys | None:
        """Return the last update's window rotated by `rotation`; None when it is not in the buffer."""
        if self._first_slot is None:
            return None
        keys = self._window.keys
        # A change of frequencies replaces the tables, so rotated keys are valid as long as the tables are the same.
        if self._rotated is None or self._rotated_by is not rotation.cos:
            with torch.inference_mode(False):
                self._rotated = torch.empty_like(keys)
            self._rotated_by, self._num_rotated = rotation.cos, 0
        # Attention depends on distances only, so the slot serves as the position.
        fresh = slice(self._num_rotated, self._filled)
        self._rotated[:, :, fresh] = rotation.consecutive(keys[:, :, fresh], self._num_rotated)
        self._num_rotated = self._filled
        return RotatedKeys(self._rotated[:, :, self._first_slot : self._filled], self._first_slot)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, including padding and evicted ones: the index of the next token."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a padding mask over everything seen."""
        return self.num_tokens + query_length, 0

    def reset(self) -> None:
        """Clear the cache."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.start = self.num_padding = self._incoming = None
        self.is_initialized = self._is_expected = False
        self._filled = self.num_tokens = self._most_padding = self._num_rotated = 0
        self._rotated = self._first_slot = None

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `ValueError`: evicted tokens cannot be restored."""
        raise ValueError(
            f"crop({tokens_to_remove}): a LambdaCache has evicted the tokens that would return; use a DynamicCache "
            "for decoding that removes tokens (assisted or contrastive)"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Set row i to the former row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    @property
    def _window(self) -> KeyValues:
        assert self.keys is not None
        assert self.values is not None
        return KeyValues(self.keys, self.values)

    def _count(self, window: KeyValues, num_new: int, valid: Tensor | None) -> None:
        num_before, padding_before = self.num_tokens, self.num_padding
        self.num_tokens += num_new
        if valid is not None:
            missing = (~valid).sum(dim=1)
            self.num_padding = missing if padding_before is None else padding_before + missing
        self._take_start(window, num_before, padding_before)
        self._most_padding = 0 if self.num_padding is None else int(self.num_padding.max())

    def _extend(self, new: KeyValues, valid: Bool[Tensor, "B S"] | None) -> tuple[Tensor, Tensor]:
        """Add tokens by concatenation, then keep the last L - 1: for long calls, gradients and padding."""
        reach = min(self._filled, self.n_local - 1)
        past = self._window.span(self._filled - reach, self._filled)
        num_new = new.keys.shape[2]
        order = None if valid is None else left_pad_order(self._valid_with_past(reach, valid))
        window = KeyValues(*(gather_tokens(torch.cat(pair, dim=2), order) for pair in zip(past, new, strict=True)))
        self._first_slot = None
        self._count(window, num_new, valid)
        self._keep(window.span(max(0, reach + num_new - self.n_local + 1), reach + num_new))
        return window

    def _valid_with_past(self, reach: int, valid: Tensor) -> Tensor:
        index = torch.arange(self.num_tokens - reach, self.num_tokens, device=valid.device).expand(len(valid), -1)
        padding = 0 if self.num_padding is None else self.num_padding[:, None]
        return torch.cat((index >= padding, valid), dim=1)

    def _keep(self, last: KeyValues) -> None:
        """Store `last` as the window, in a buffer of full size."""
        with_gradient = torch.is_grad_enabled() and last.keys.requires_grad
        num_kept = last.keys.shape[2]
        if with_gradient:
            rest = self._window.keys.shape[2] - num_kept
            # Keep the graph through the cache: a new tensor instead of a write into the old buffer.
            self.keys, self.values = (torch.cat((x, x.new_empty(*x.shape[:2], rest, x.shape[3])), 2) for x in last)
        else:
            for buffer, states in zip(self._window, last, strict=True):
                buffer[:, :, :num_kept] = states.detach()
        self._filled, self._num_rotated = num_kept, 0

    def _move_to_beginning(self, num_kept: int) -> None:
        for buffer in self._window:
            buffer[:, :, :num_kept] = buffer[:, :, self._filled - num_kept : self._filled].clone()
        self._filled, self._num_rotated = num_kept, 0

    def _take_start(self, window: KeyValues, num_before: int, padding_before: Tensor | None) -> None:
        """Copy the first G valid tokens of each row; those not yet stored are among the new ones."""
        # Decided from host-side counts, so decoding steps do not synchronize here.
        is_complete = num_before - self._most_padding >= self.n_global
        if is_complete or self.n_global == 0:
            return
        device, num_rows = window.keys.device, window.keys.shape[0]
        slot = torch.arange(self.n_global, device=device).expand(num_rows, -1)
        num_stored = torch.full((num_rows, 1), num_before, device=device)
        # Slot g is stream index g plus the row's padding; shift it into the window, which ends at the last token.
        index = slot - (self.num_tokens - window.keys.shape[2])
        if padding_before is not None:
            num_stored = num_stored - padding_before[:, None]
        if self.num_padding is not None:
            index = index + self.num_padding[:, None]
        index = index.clamp(0, window.keys.shape[2] - 1)
        fresh = [gather_tokens(x, index) for x in window]
        if self.start is not None:
            is_stored = (slot < num_stored)[:, None, :, None]
            fresh = [torch.where(is_stored, old, x) for old, x in zip(self.start, fresh, strict=True)]
        self.start = KeyValues(*fresh)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = (function(x) for x in self._window)
        self._rotated = self._first_slot = None
        self.start = None if self.start is None else KeyValues(*(function(x) for x in self.start))
        self.num_padding = None if self.num_padding is None else function(self.num_padding)
