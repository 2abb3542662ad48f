"""A cache of constant size for streams without end: per layer the G starting tokens and the L - 1 latest ones.

Keys are held unrotated, so nothing in the cache depends on how far the stream has come. The buffer has room for a few
tokens beyond L - 1 and is moved to its beginning when that is used up, so a decoding step copies one token. Beside it
is a copy of the keys rotated by their place in the buffer, made anew at each such move: that is about eight keys a
step, and no rounding adds up.
Shapes: `B` batch, `K` key heads, `S` new tokens, `D` width.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from clex_train.lm_infinite.padding import gather_tokens, left_pad_order
from clex_train.lm_infinite.rotation import TableRotation
from clex_train.lm_infinite.stream import KeyValues, RotatedKeys, Stream

MIN_SPARE_SLOTS = 16


def spare_slots(n_local: int) -> int:
    """Tokens that fit into a buffer beyond L - 1."""
    return max(MIN_SPARE_SLOTS, n_local // 8)


class LambdaCache(Cache):
    """A KV cache for a model after `apply_lm_infinite`; made by `LmInfinite.new_cache`."""

    def __init__(self, layers: list["LambdaCacheLayer"]) -> None:
        super().__init__(layers=list(layers))


class LambdaCacheLayer(CacheLayerMixin):
    """One layer: the starting tokens, and a window that returns what the new queries can reach."""

    is_sliding = False

    def __init__(self, n_local: int, n_global: int) -> None:
        super().__init__()
        self.n_local, self.n_global = n_local, n_global
        self.num_tokens = 0
        self.num_padding: Tensor | None = None
        """int64 [B], padding seen so far; None for none."""
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
        """Where the stream stands after the last update."""
        return Stream(self.num_tokens, self.num_padding)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty window, of the dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self.n_local - 1 + spare_slots(self.n_local)
        # Those of inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                x.new_empty(x.shape[0], x.shape[1], capacity, x.shape[3]) for x in (key_states, value_states)
            )
        self.is_initialized = True

    def expect(self, num_rows: int, valid: Bool[Tensor, "B S"] | None) -> None:
        """Announce an `update` by Lambda attention: its rows, and which of its tokens are no padding (None: all).

        `ValueError` for another number of rows than is held.
        """
        if self.is_initialized and num_rows != len(self._window.keys):
            raise ValueError(
                f"cache=LambdaCache: filled with {len(self._window.keys)} rows, not with {num_rows}; take "
                "new_cache(), or change its rows by batch_repeat_interleave or batch_select_indices"
            )
        self._is_expected, self._incoming = True, valid

    def update(
        self, key_states: Float[Tensor, "B K S D"], value_states: Float[Tensor, "B K S V"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "B K T D"], Float[Tensor, "B K T V"]]:
        """Take in new tokens; return all unrotated keys and values that the window of one of them reaches.

        Padding among them is moved to the front of the row. Start tokens are in `start`. `ValueError` for a call that
        was not expected: another attention than Lambda attention would take the window for all keys.
        """
        if not self._is_expected:
            raise ValueError(
                "cache=LambdaCache: lm_infinite is not in force on this model (undo() ends it), whose "
                "attention needs all keys; leave the cache out, or call apply_lm_infinite first"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, valid = KeyValues(key_states, value_states), self._incoming
        self._is_expected, self._incoming = False, None
        if valid is not None and bool(valid.all()):
            valid = None
        num_new, capacity = key_states.shape[2], self._window.keys.shape[2]
        wants_gradient = torch.is_grad_enabled() and key_states.requires_grad
        if wants_gradient or valid is not None or num_new > capacity:
            return self._extend(new, valid)
        if self._filled + num_new > capacity:
            self._move_to_beginning(min(self._filled, self.n_local - 1))
        if self._filled + num_new > capacity:
            return self._extend(new, None)
        for buffer, states in zip(self._window, new, strict=True):
            buffer[:, :, self._filled : self._filled + num_new] = states
        self._first_slot = max(0, self._filled - self.n_local + 1)
        self._filled += num_new
        window = self._window.span(self._first_slot, self._filled)
        self._count(window, num_new, None)
        return window

    def rotated_window(self, rotation: TableRotation) -> RotatedKeys | None:
        """The keys of the last update's window rotated by `rotation`; None when they are not in the buffer."""
        if self._first_slot is None:
            return None
        keys = self._window.keys
        if self._rotated is None or self._rotated_by is not rotation.cos:
            with torch.inference_mode(False):
                self._rotated = torch.empty_like(keys)
            self._rotated_by, self._num_rotated = rotation.cos, 0
        fresh = slice(self._num_rotated, self._filled)
        self._rotated[:, :, fresh] = rotation.consecutive(keys[:, :, fresh], self._num_rotated)
        self._num_rotated = self._filled
        return RotatedKeys(self._rotated[:, :, self._first_slot : self._filled], self._first_slot)

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones among them: what the next token's index is."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a padding mask over everything seen."""
        return self.num_tokens + query_length, 0

    def reset(self) -> None:
        """Forget the stream."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.start = self.num_padding = self._incoming = None
        self.is_initialized = self._is_expected = False
        self._filled = self.num_tokens = self._most_padding = self._num_rotated = 0
        self._rotated = self._first_slot = None

    def crop(self, tokens_to_remove: int) -> None:
        """`ValueError`: what left the window is gone."""
        raise ValueError(
            f"crop({tokens_to_remove}): a LambdaCache has let go of the tokens that would return; decode with a "
            "DynamicCache where tokens are taken back (assisted or contrastive decoding)"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
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
        """The way for many tokens, gradients and padding: concatenate, then keep the last L - 1."""
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
        """Make `last` the window, in a buffer of the usual size."""
        with_gradient = torch.is_grad_enabled() and last.keys.requires_grad
        num_kept = last.keys.shape[2]
        if with_gradient:
            rest = self._window.keys.shape[2] - num_kept
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
        """Copy the first G tokens of each row: those not held before are among the new ones, in the window."""
        is_complete = num_before - self._most_padding >= self.n_global
        if is_complete or self.n_global == 0:
            return
        device, num_rows = window.keys.device, window.keys.shape[0]
        slot = torch.arange(self.n_global, device=device).expand(num_rows, -1)
        held = torch.full((num_rows, 1), num_before, device=device)
        index = slot - (self.num_tokens - window.keys.shape[2])
        if padding_before is not None:
            held = held - padding_before[:, None]
        if self.num_padding is not None:
            index = index + self.num_padding[:, None]
        index = index.clamp(0, window.keys.shape[2] - 1)
        fresh = [gather_tokens(x, index) for x in window]
        if self.start is not None:
            is_held = (slot < held)[:, None, :, None]
            fresh = [torch.where(is_held, old, x) for old, x in zip(self.start, fresh, strict=True)]
        self.start = KeyValues(*fresh)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = (function(x) for x in self._window)
        self._rotated = self._first_slot = None
        self.start = None if self.start is None else KeyValues(*(function(x) for x in self.start))
        self.num_padding = None if self.num_padding is None else function(self.num_padding)
