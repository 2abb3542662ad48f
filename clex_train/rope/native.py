"""Handles for models that are evaluated unchanged because no theta(t) can be trained on them.

ALiBi, learned positions and the like have nothing to scale; the handle only tracks the length. A RoPE of rope_type
dynamic or longrope follows the length of each call by itself. Here it follows the length that the handle sets, so that
a window read in chunks gives the result of one forward. Shapes: `P` pairs = rotary_dim / 2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PretrainedConfig

from clex_train.attention import kv_cache
from clex_train.attention.visible_keys import CallListener
from clex_train.model_config.meta_models import model_on_meta
from clex_train.rope import probe
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import Frequencies
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils.errors import ConfigError

# Decoding asks for a new length at every token, so the cache of spectra needs a bound.
MAX_KNOWN_LENGTHS = 256


def install_native(model: nn.Module, context_len: int) -> RotaryHandle:
    """Create the handle of a model that keeps its own positions, of any kind.

    `context_len` is L in tokens.

    Raises:
        ConfigError: the model cannot be read through a KV cache, or follows the length in an unknown way.
        ValueError: the model is patched already.
    """
    if not probe.has_rotary(model):
        return NoRotaryHandle(model, context_len)
    site = probe.find_rotary(model)
    traits = probe.probe(site.module, getattr(model, "config", None))
    # Local layers keep one spectrum, so only the RoPE of the others may follow the length.
    probe.require_fixed_local_layers(site.module, traits)
    follows = probe.length_dependent_type(site.module) is not None
    own = NativeScaling(site.module, traits, context_len) if follows else None
    return RotaryHandle(model, site, traits, context_len, own)


def native_handle_on_meta(config: PretrainedConfig, context_len: int, trust_remote_code: bool = False) -> RotaryHandle:
    """Create `install_native`'s handle from an architecture without weights, to check requests beforehand."""
    return install_native(model_on_meta(config, trust_remote_code), context_len)


class NativeScaling:
    """theta at every length as the model's own rotary module computes it (implements `scaling.table.Frequencies`)."""

    def __init__(self, module: nn.Module, traits: probe.Traits, context_len: int) -> None:
        self.method = str(probe.length_dependent_type(module))
        self.context_len: int | None = context_len
        self.num_pairs = len(traits.base[traits.scaled].inv_freq)
        self.t_max = float("inf")
        self._module, self._traits, self._length = module, traits, context_len
        self._known: dict[int, Spectrum] = {}
        # Fail at installation, not at the first long call, if the module scales in an unknown way.
        self.at(2.0)

    def at(self, t: float) -> Spectrum:
        """Return the spectrum of a call of t * L tokens."""
        return self.least_upper_bound(round(t * self._length), self._length)

    def least_upper_bound(self, num_tokens: int, context_len: int, clamp: bool = False) -> Spectrum:
        """Return the spectrum of a call of `num_tokens` tokens; without a t_max there is nothing to clamp."""
        if num_tokens not in self._known:
            if len(self._known) >= MAX_KNOWN_LENGTHS:
                self._known.clear()
            t = max(1.0, num_tokens / context_len)
            self._known[num_tokens] = probe.spectrum_at_length(self._module, self._traits, num_tokens, t)
        return self._known[num_tokens]


class NoRotaryHandle(RotaryHandle):
    """Handle of a model without RoPE: nothing is replaced, tables have no pairs, and t is only a label.

    `max_tokens` is the size of the model's position table; None where there is no limit.
    """

    def __init__(self, model: nn.Module, context_len: int) -> None:
        self.model, self.context_len = model, context_len
        self.table: Frequencies | None = None
        self.own: Frequencies | None = None
        config: Any = getattr(model, "config", None)
        self.max_tokens: int | None = None
        # ALiBi configs state a max_position_embeddings or the like too, but their biases have no limit.
        if not probe.has_alibi(model):
            self.max_tokens = getattr(config, "max_position_embeddings", None)
        if not kv_cache.accepts_keys(model):
            raise ConfigError(
                "model_type",
                self.model_type,
                "no rotary position embedding and no KV cache to read windows through; use a transformer",
            )

    @property
    def base_inv_freq(self) -> Float64[Tensor, " P"]:
        """Empty: there are no frequencies, P = 0."""
        return torch.zeros(0, dtype=torch.float64)

    @property
    def layout(self) -> str | None:
        """None: there are no pairs."""
        return None

    def use(self, table: Frequencies | None, clamp: bool = False) -> None:
        """Keep the table, whose grid labels lengths with t; `ValueError` for one that has frequencies."""
        if table is not None and table.num_pairs:
            raise ValueError(f"table of {table.num_pairs} pairs: model_type={self.model_type} has no RoPE")
        self.table = table

    @contextmanager
    def pinned(self, t: float) -> Iterator[None]:
        """Run the model unchanged."""
        yield

    @contextmanager
    def fixed(self, num_tokens: int) -> Iterator[None]:
        """Run the model unchanged, with room for `num_tokens`; `ConfigError` beyond its table of positions."""
        self.require_room(num_tokens)
        config: Any = self.model.config
        room = getattr(config, "max_seq_len", None)
        # MPT builds biases for `max_seq_len` tokens; those for fewer are their tail, so raising it changes no result.
        if room is None or room >= num_tokens:
            yield
            return
        config.max_seq_len = num_tokens
        try:
            yield
        finally:
            config.max_seq_len = room

    def require_room(self, num_tokens: int) -> None:
        """Raise `ConfigError`, naming both numbers, if the model has fewer positions."""
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise ConfigError(
                "num_tokens",
                num_tokens,
                f"model_type={self.model_type} has positions for {self.max_tokens} tokens "
                "only; shorten evaluation.lengths",
            )

    @contextmanager
    def training(
        self, spectrum: Spectrum, positions: Tensor | None = None, num_tokens: int | None = None
    ) -> Iterator[None]:
        """Raise `ConfigError`: there are no frequencies to train."""
        raise ConfigError("model_type", self.model_type, "no rotary position embedding; use a RoPE model")
        yield

    def on_call(self, listener: CallListener) -> Callable[[], None]:
        """Raise `ConfigError`: listeners of calls and of their length need a RoPE."""
        raise ConfigError("model_type", self.model_type, "no rotary position embedding, so lengths are not tracked")

    def undo(self) -> None:
        """Do nothing: the model was not changed."""
