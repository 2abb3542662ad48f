"""Insert a frequency table into a Hugging Face causal LM by replacing one module on the instance.

handle = install_rotary(model, context_len)
handle.use(table)               each call: t = least upper bound of n / L on the table's grid, n = keys + new tokens
handle.pinned(t)                context: keep t fixed
handle.fixed(num_tokens)        context: treat every call as one of `num_tokens`
handle.training(spectrum, ...)  context: use this spectrum, with gradients and sampled positions
handle.undo()                   restore the model
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache

from clex_train.attention import kv_cache
from clex_train.attention.kv_cache import LibraryChanged
from clex_train.attention.layer_probe import rotary_attention
from clex_train.attention.visible_keys import CallListener, NewTokens
from clex_train.rope import key_cache, key_rotations, receptive_field
from clex_train.rope.generation import KeptCache
from clex_train.rope.hooks import (
    CallArgument,
    CastPositionEmbeddings,
    Removable,
    SelectPositionEmbeddings,
    layers_with_position_embeddings,
)
from clex_train.rope.probe import Site, Traits, find_rotary, probe, require_fixed_frequencies, require_rotary
from clex_train.rope.rotary import ScaledRotary, require_usable
from clex_train.scaling.frequency_table import Frequencies
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils import log
from clex_train.utils.errors import ConfigError

__all__ = ["RotaryHandle", "install_rotary", "require_rotary"]

logger = log.get(__name__)

CALL_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")


def install_rotary(model: nn.Module, context_len: int) -> "RotaryHandle":
    """Replace the rotary module of `model`; it computes the same as before until the handle is used.

    `context_len` is L in tokens. The model may still be on the meta device; call `deepspeed.initialize` afterwards. A
    model on which theta(t) has nothing to act is accepted here; callers that scale use `require_scalable`.

    Raises:
        ConfigError: the model has no RoPE, or several sets of frequencies up to L tokens (names the model type).
        ValueError: `context_len` < 1, or a model that is patched already.
    """
    if context_len < 1:
        raise ValueError(f"context_len={context_len}: must be at least 1 token, the context length of the base model")
    site = find_rotary(model)
    traits = probe(site.module, getattr(model, "config", None))
    require_fixed_frequencies(site.module, traits, context_len)
    return RotaryHandle(model, site, traits, context_len)


@dataclass(frozen=True)
class _Override:
    """Settings of the handle's context managers for the calls inside; None keeps the rule of `use`."""

    spectrum: Spectrum | None = None
    num_tokens: int | None = None
    positions: Tensor | None = None
    is_training: bool = False


class _CallState(NamedTuple):
    """State passed from the hook before a call to the hook after it."""

    spectrum: Spectrum
    cache: Cache | None
    record: key_rotations.KeyRecord | None
    num_tokens: int
    num_new: int
    moved: bool
    """True if the first of several new tokens, fed alone, would have used another spectrum."""


class RotaryHandle:
    """Control of one model's frequencies; created by `install_rotary`."""

    def __init__(
        self, model: nn.Module, site: Site, traits: Traits, context_len: int, own: Frequencies | None = None
    ) -> None:
        self.model, self.context_len, self.traits = model, context_len, traits
        self.table: Frequencies | None = None
        self.own = own
        """Frequencies of the model itself at each length; None if they do not depend on the length."""
        self.rotary = ScaledRotary(traits.base, traits.scaled, traits.expansion, traits.casts)
        self._site, self._clamp, self._warned = site, False, False
        self._warned_about_candidates = False
        self._override = _Override()
        self._call: _CallState | None = None
        self._listeners: list[CallListener] = []
        self._arguments = {name: CallArgument(site.parent, name) for name in CALL_ARGUMENTS}
        # Replaced on the instance: no class of transformers changes, and other models keep theirs.
        setattr(site.parent, site.name, self.rotary)
        # Bound methods, so that a deep copy of the model carries hooks bound to the copy.
        self._removals: list[Removable] = [
            site.parent.register_forward_pre_hook(self._before_call, with_kwargs=True),
            site.parent.register_forward_hook(self._after_call),
            KeptCache(model),
        ]
        self._keep_local_layers()

    @property
    def base_inv_freq(self) -> Float64[Tensor, " P"]:
        """Inverse frequencies of the model itself, in radians per token, from which CLEX starts."""
        return self.traits.base[self.traits.scaled].inv_freq.clone()

    @property
    def model_type(self) -> str:
        """Model family, for messages."""
        return str(getattr(getattr(self.model, "config", None), "model_type", type(self.model).__name__))

    @property
    def rotary_config(self) -> Any:
        """Config that the model's rotary module was built from; None for a module without one."""
        return getattr(self._site.module, "config", None)

    @property
    def layout(self) -> str | None:
        """Pairing of key components: `half` or `interleaved`; None if cached keys cannot be rerotated."""
        return self.traits.layout

    @cached_property
    def scaled_layers(self) -> dict[int, bool | None]:
        """Map from layer index to True if the scaled RoPE rotates its keys; None for unknown."""
        return receptive_field.scaled_layers(self.model, self.traits, self.rotary.local_layers)

    @cached_property
    def rotated_part(self) -> str:
        """Part of a cache layer that holds the rotated keys: `keys`, or `values` under latent attention."""
        return receptive_field.rotated_part(self.model, self.traits)

    def require_scalable(self) -> None:
        """Raise `ConfigError`, naming the model type, where theta(t) has nothing to act on."""
        receptive_field.require_scalable(self.model, self._site.module, self.traits, self.context_len)

    def use(self, table: Frequencies | None, clamp: bool = False) -> None:
        """Use `table` from now on: each call takes the spectrum of the least t >= n / L. None restores the model's own.

        A call beyond t_max * L raises `ConfigError` naming n, t_max and L, or with `clamp` uses t_max and warns once.

        Raises:
            ConfigError: the table has another rotary dimension or context length.
        """
        if table is not None:
            self._check_table(table)
        self.table, self._clamp, self._warned = table, clamp, False

    @contextmanager
    def pinned(self, t: float) -> Iterator[None]:
        """Use theta(t) for every call in the context, at any length; `t` is on the table's grid."""
        if self.table is None:
            raise ValueError(f"t={t:g}: no frequency table is set; call handle.use(table) first")
        with self._overridden(spectrum=self.table.at(t)):
            yield

    @contextmanager
    def fixed(self, num_tokens: int) -> Iterator[None]:
        """Treat every call in the context as one of `num_tokens` tokens, so that chunks agree with one long forward.

        This sets t and log-scaling.
        """
        with self._overridden(spectrum=self._select_spectrum(num_tokens), num_tokens=num_tokens):
            yield

    @contextmanager
    def training(
        self,
        spectrum: Spectrum,
        positions: Float[Tensor, "B S"] | Int64[Tensor, "B S"] | None = None,
        num_tokens: int | None = None,
    ) -> Iterator[None]:
        """Use `spectrum` in the context, with gradients to its `inv_freq` and tokens at `positions` (None: plain).

        `num_tokens` is the length of the whole row where a call has part of it (sequence parallel).

        Raises:
            ValueError: the positions or frequencies do not fit the batch or model.
        """
        if positions is not None and positions.dtype not in (torch.float64, torch.int64):
            # float32 would round fractional positions.
            raise ValueError(
                f"positions of {positions.dtype}: sampled positions must be float64 or int64, to stay exact"
            )
        # On a GPU this check would synchronize at every micro-batch.
        if positions is not None and positions.device.type == "cpu":
            require_usable(positions)
        if len(spectrum.inv_freq) != len(self.base_inv_freq):
            raise ValueError(
                f"inv_freq of {len(spectrum.inv_freq)} pairs: the model rotates {len(self.base_inv_freq)} pairs"
            )
        # Only families whose stock module rounds cos and sin need the casts.
        if self.traits.casts and not self.rotary.layers_cast:
            self._cast_in_layers(self._site.parent)
        with self._overridden(spectrum=spectrum, num_tokens=num_tokens, positions=positions, is_training=True):
            yield

    def on_length(self, listener: Callable[[int], None]) -> Callable[[], None]:
        """Follow `on_call` with n alone: cached keys and new tokens, in training the tokens of a row."""
        return self.on_call(lambda call: listener(call.num_tokens))

    def on_call(self, listener: CallListener) -> Callable[[], None]:
        """Call `listener` with the new tokens of each call before it is made; return what unsubscribes it."""
        self._listeners.append(listener)

        def stop() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return stop

    def undo(self) -> None:
        """Restore the stock module and remove every hook. Caches filled in the meantime must be discarded."""
        setattr(self._site.parent, self._site.name, self._site.module)
        for removal in self._removals:
            removal.remove()
        self._removals.clear()
        self._listeners.clear()

    def _keep_local_layers(self) -> None:
        """Keep the model's own frequencies in layers with a short window, unless those follow the length."""
        # Such layers never see a distance beyond L, so their frequencies need no scaling.
        local = (
            receptive_field.local_layers(self.model, self.traits, self.context_len) if self.own is None else frozenset()
        )
        self.rotary.local_layers = local
        for attention in rotary_attention(self.model) if local else []:
            hook = SelectPositionEmbeddings(attention, attention.layer_idx in local)
            self._removals.append(attention.register_forward_pre_hook(hook, with_kwargs=True))

    def _cast_in_layers(self, parent: nn.Module) -> None:
        """Cast cos and sin in each decoder layer instead of once in the rotary module."""
        # Installed only when training starts, and then kept: a hook per layer slows down every decoding step.
        layers = layers_with_position_embeddings(parent)
        self.rotary.layers_cast = bool(layers)
        for layer in layers:
            hook = CastPositionEmbeddings(layer)
            self._removals.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, position_ids, mask, cache = self._inputs(args, kwargs)
        # Neither ids nor embeddings under a known name: `_after_call` reports it once positions have passed.
        if tokens is None:
            return
        override = self._override
        record = key_rotations.find_record(cache)
        if override.is_training and record is not None:
            raise ValueError(f"the KV cache holds {record.num_keys} keys: training takes whole rows, without a cache")
        num_new = tokens.shape[1]
        # Training rows have no cache, and their position_ids restart at documents, so count tokens instead.
        num_tokens = num_new if override.is_training else key_rotations.count_tokens(num_new, position_ids, record)
        spectrum = self._select_spectrum(num_tokens) if override.spectrum is None else override.spectrum
        moved = False
        if cache is not None and record is not None:
            # Assisted decoding verifies several tokens at one t; plain decoding would have used a smaller t first.
            moved = override.spectrum is None and num_new > 1 and not self._selects(record.num_tokens + 1, spectrum)
            self._warn_about_candidates(record)
            key_cache.rerotate_keys(cache, record, spectrum, self.layout, self.scaled_layers, self.rotated_part)
        self.rotary.spectrum, self.rotary.positions = spectrum, override.positions
        self._call = _CallState(spectrum, cache, record, num_tokens, num_new, moved)
        num_cached = record.num_keys if record else 0
        new = NewTokens(override.num_tokens or num_tokens, num_new, num_cached, position_ids, mask)
        for listener in self._listeners:
            listener(new)

    def _after_call(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self._call = self._call, None
        # The rotary module has seen the positions that the model derived itself, from a mask or a cache.
        position_ids, self.rotary.last_position_ids = self.rotary.last_position_ids, None
        if position_ids is None:
            return
        if call is None:
            decoder = type(self._site.parent).__name__
            raise LibraryChanged(f"{decoder} takes its tokens under names other than input_ids and inputs_embeds")
        kv_cache.require_found(call.cache, output, call.num_new)
        cache = kv_cache.find_in_output(output) if call.cache is None else call.cache
        if cache is not None:
            key_rotations.record_keys(cache, call.record, call.spectrum, position_ids, call.num_tokens, call.moved)

    def _inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None, Any, Cache | None]:
        found = {name: argument.find(args, kwargs) for name, argument in self._arguments.items()}
        tokens = found["inputs_embeds"] if found["input_ids"] is None else found["input_ids"]
        return tokens, found["position_ids"], found["attention_mask"], kv_cache.find_in_call(args, kwargs)

    def _select_spectrum(self, num_tokens: int) -> Spectrum:
        if self.table is None and self.own is not None:
            return self.own.least_upper_bound(num_tokens, self.context_len)
        if self.table is None:
            return self.rotary.base[self.rotary.scaled]
        spectrum = self.table.least_upper_bound(num_tokens, self.context_len, clamp=self._clamp)
        # Once per table: generation beyond t_max would repeat it for every token.
        if not self._warned and num_tokens > self.table.t_max * self.context_len:
            self._warned = True
            logger.warning(
                "num_tokens=%d exceeds t_max * L = %g * %d: t stays at t_max, and quality will degrade",
                num_tokens,
                self.table.t_max,
                self.context_len,
            )
        return spectrum

    def _selects(self, num_tokens: int, spectrum: Spectrum) -> bool:
        own = self._select_spectrum(num_tokens)
        return own is spectrum or own.t == spectrum.t

    def _warn_about_candidates(self, record: key_rotations.KeyRecord) -> None:
        """Warn once that candidates were verified at a larger t than plain decoding would have used."""
        if record.lost_candidates and not self._warned_about_candidates:
            self._warned_about_candidates = True
            logger.warning(
                "assisted decoding: t moved within tokens that were verified in one call, so the answer can differ "
                "from plain decoding; pin t with handle.pinned(t) or handle.fixed(num_tokens)"
            )
        record.lost_candidates = False

    def _check_table(self, table: Frequencies) -> None:
        pairs = len(self.base_inv_freq)
        if table.num_pairs != pairs:
            raise ConfigError(
                f"table of {table.num_pairs} pairs (rotary dimension {2 * table.num_pairs})",
                None,
                f"the model rotates {pairs} pairs (rotary dimension {2 * pairs})",
            )
        if table.context_len not in (None, self.context_len):
            raise ConfigError(
                f"table for context_len={table.context_len}", None, f"the model's handle has {self.context_len}"
            )

    @contextmanager
    def _overridden(self, **override: Any) -> Iterator[None]:
        before, self._override = self._override, _Override(**override)
        try:
            yield
        finally:
            self._override = before
