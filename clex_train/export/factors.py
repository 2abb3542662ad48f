"""Factors of a model at one t: plain RoPE's frequencies divided by the model's, as `longrope` and GGUF divide by them.

    F_j = rope_theta^(-2j/d) / theta_j(t),    attention factor = that of the base's own scaling

Relative to plain RoPE and not to theta(1), so a base with linear, llama3 or yarn scaling folds in. A model of a formula
(pi, yarn, ...) has factors too, at the one t of its config. Shapes: `P` pairs = d / 2, d the rotary dimension.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from clex_train.config.scaling import LogScale
from clex_train.rope.hf_scalings import ConfiguredRope
from clex_train.rope.patch import RotaryHandle
from clex_train.rope.rotary import LayerType
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import RELATIVE_SLACK, FrequencyTable
from clex_train.scaling.spectrum import STILL, Spectrum
from clex_train.utils.errors import ConfigError, require


@dataclass
class Source:
    """A model to export, known from its records alone: no weights are read."""

    arch: PretrainedConfig
    """Architecture of the base model, with the base's own RoPE."""
    handle: RotaryHandle
    context_len: int
    """L in tokens."""
    clex: Clex | None = None
    table: FrequencyTable | None = None
    log_scale: LogScale = LogScale.off

    @property
    def t_max(self) -> float:
        """Largest scale factor; for a model without a field that of its own config."""
        if self.table is not None:
            return self.table.t_max
        served = getattr(self.arch.get_text_config(), "max_position_embeddings", None) or self.context_len
        return math.inf if self._rope_type == "dynamic" else max(1.0, served / self.context_len)

    @property
    def t_factor(self) -> float:
        """A context uses the t of one this many times as long."""
        return 1.0 if self.table is None else self.table.t_factor

    @property
    def _rope_type(self) -> str:
        return "default" if self.handle.own is None else self.handle.own.method

    def t_for(self, length: int) -> float:
        """Return the t that the product uses for a context of `length` tokens; `ConfigError` if it serves fewer."""
        reach = self.t_max * self.context_len
        require(
            2 <= length <= reach * (1 + RELATIVE_SLACK),
            "length",
            length,
            f"the model serves from 2 to t_max * L = {self.t_max:g} * {self.context_len:,} = {reach:,.0f} tokens",
        )
        if self.table is not None:
            return self.table.least_upper_bound(length, self.context_len).t
        return self.t_max if self.handle.own is None else max(1.0, length / self.context_len)

    def longest_at(self, t: float) -> int:
        """Return the most tokens of a context for which the product uses `t`: t L / t_factor, and all at t_max."""
        looks_ahead = 1.0 if t >= self.t_max else self.t_factor
        return max(1, round(t * self.context_len / looks_ahead))

    def spectrum_at(self, t: float) -> Spectrum:
        """Return the frequencies at `t`, with the whole attention factor; `ConfigError` for a t that it has not."""
        self._require_reached(t)
        own = self.handle.traits.base[self.handle.traits.scaled]
        if self.table is not None:
            found = _in_table(self.table, self.clex, t)
        elif self.handle.own is not None:
            found = self.handle.own.at(t)
        else:
            return replace(own, t=t)
        return replace(found, t=t, attention_factor=found.attention_factor * own.attention_factor)

    def _require_reached(self, t: float) -> None:
        moves = self.table is not None or self.handle.own is not None
        require(
            moves or abs(t - self.t_max) <= RELATIVE_SLACK * t,
            "t",
            f"{t:g}",
            f"no CLEX field: the frequencies of the model are fixed, at t={self.t_max:g} of L = {self.context_len:,} "
            "tokens; leave t out",
        )
        require(
            1 <= t <= self.t_max * (1 + RELATIVE_SLACK),
            "t",
            f"{t:g}",
            f"from 1 to t_max={self.t_max:g}, the range that the model was trained for",
        )


@dataclass(frozen=True)
class FixedRope:
    """RoPE of a model at one t, in the terms of other engines."""

    t: float
    context_len: int
    """L in tokens."""
    factors: list[float]
    """[P]: F_j of the layers that see the whole context."""
    attention_factor: float
    """Multiplies cos and sin; 1 unless the base has a scaling with one (yarn, longrope)."""
    rope_theta: float
    layer_type: LayerType
    """Type of those layers; None if all layers share one RoPE."""
    local: dict[str, list[float]]
    """[P] by layer type: factors of the layers with a RoPE of their own, such as Gemma 3's local ones."""
    interleaved: bool
    """True if pairs are components (2j, 2j + 1)."""

    @property
    def served_len(self) -> int:
        """Longest context in tokens, round(t L)."""
        return round(self.t * self.context_len)

    @property
    def rotary_dim(self) -> int:
        """d, rotated components of a head."""
        return 2 * len(self.factors)


def rope_at(source: Source, t: float) -> FixedRope:
    """Return the factors of a model at `t`.

    Raises:
        ConfigError: `t` is outside the solvable range, the config names no rope_theta, or layers that share the RoPE
            keep the frequencies of the base, which one list of factors cannot express.
    """
    spectrum, traits = source.spectrum_at(t), source.handle.traits
    _require_one_rope(source)
    rope = _configured(source, traits.scaled)
    others = {
        str(kind): _factors(_configured(source, kind).theta, own.inv_freq)
        for kind, own in traits.base.items()
        if kind != traits.scaled
    }
    return FixedRope(
        t=spectrum.t,
        context_len=source.context_len,
        factors=_factors(rope.theta, spectrum.inv_freq),
        attention_factor=spectrum.attention_factor,
        rope_theta=rope.theta,
        layer_type=traits.scaled,
        local=others,
        interleaved=traits.layout == "interleaved",
    )


def _configured(source: Source, layer_type: LayerType) -> ConfiguredRope:
    # Of the base's architecture: the rotary module of a model in memory may have been built from another config.
    config = source.arch.get_text_config()
    return ConfiguredRope(source.handle.base_inv_freq, source.context_len, config=config, layer_type=layer_type)


def _factors(theta: float, inv_freq: Tensor) -> list[float]:
    """Divide the plain frequencies of base `theta` by `inv_freq` [P]; a pair that does not rotate gets `STILL`."""
    num_pairs = len(inv_freq)
    plain = theta ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    ratio = plain / inv_freq.detach().double().cpu()
    factors: list[float] = torch.where(ratio < STILL, ratio, STILL).tolist()
    return factors


def _in_table(table: FrequencyTable, clex: Clex | None, t: float) -> Spectrum:
    """Return the table's spectrum at `t`, or solve the field for one between its points."""
    try:
        return table.at(t)
    except ValueError:
        if clex is None:
            raise ConfigError("t", f"{t:g}", "not on the grid of the frequency table") from None
    # From 1, as every table begins; the solver keeps within the field's tolerance at any t up to t_max.
    return clex.table([1.0, t]).at(t)


def _require_one_rope(source: Source) -> None:
    local = sorted(source.handle.rotary.local_layers)
    if source.table is not None and local:
        raise ConfigError(
            "model_type",
            source.handle.model_type,
            f"layers {', '.join(map(str, local))} see at most L tokens and keep the base's frequencies, but share one "
            "RoPE with the others, and no config has two for them",
        )
