"""How RoPE's frequencies are scaled, and how the ODE of CLEX is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clex_train.config.method import EVALUATION_ONLY, FORMULAS, TRAINED_BY, Method
from clex_train.utils.bounds import MOST_ROPE_THETA, MOST_SCALE, MOST_STEPS, MOST_TOKENS, require, require_at_most


class Positions(Enum):
    plain = "plain"
    random = "random"
    uniform = "uniform"
    skip = "skip"
    mix = "mix"


class Distribution(Enum):
    uniform = "uniform"
    log_uniform = "log_uniform"


class Activation(Enum):
    silu = "silu"
    tanh = "tanh"


class LogScale(Enum):
    off = "off"
    eval = "eval"
    always = "always"
    official = "official"


MOST = {
    "t_max": MOST_SCALE,
    "t_factor": MOST_SCALE,
    "factor": MOST_SCALE,
    "rope_theta": MOST_ROPE_THETA,
    "max_chunks": MOST_TOKENS,
    "param_factor": 64,
    "lr_scale": 1e6,
    "weight_decay": 1e3,
    "clip": 1e12,
    "max_residual": 1e9,
    "check_every": MOST_STEPS,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class ScalingConfig:
    name: Method = field(default=Method.none, metadata={"choices": TRAINED_BY})
    """`none` trains with the model's own RoPE; `clex` learns the frequencies as an ODE over the scale factor; the rest
    have them by a formula (docs/recipes.md)."""
    t_max: float = 16.0
    """Largest scale factor: each optimizer step draws t from [1, t_max]; contexts up to t_max * L are served."""
    t_factor: float = 1.0
    """In use, a context takes the t of one so many times as long, up to t_max; training draws t without it."""
    t_distribution: Distribution = Distribution.uniform
    """How CLEX draws t: `uniform` (the paper) or `log_uniform`, with equal weight on each doubling of the context."""
    factor: float | None = None
    """Scale factor of a recipe by formula: contexts up to factor * L. By default what makes rows longer than L fit,
    else t_max; for `random_pos` always t_max."""
    rope_theta: float = 1e6
    """Base of the frequencies under `theta` (Code Llama's)."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` (up to L) and `long_factor` (beyond): a number for each pair that rotates."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a method that have no key here, as `scaling.options.NAME=value`: the fields of its class in
    `clex_train/scaling/methods`."""
    positions: Positions = Positions.mix
    """Where a row's tokens sit in [0, t*L): `random` (the paper), `uniform`, `skip` (chunks with gaps), `mix` of random
    and skip, or `plain` (0, 1, 2, ...)."""
    mix_random: float = 0.25
    """Share of rows that `mix` gives `random` positions; the others take `skip`."""
    max_chunks: int = 8
    """`skip` cuts a row into between 2 and this many contiguous chunks."""
    param_factor: float = 1.0
    """Width of the vector field's hidden layer in units of the rotary dimension (lambda in the paper)."""
    act: Activation = Activation.silu
    """Activation of the vector field."""
    lr_scale: float = 0.05
    """Learning rate of the ODE's parameters over the model's; 0 freezes the field, leaving the NTK drift."""
    weight_decay: float = 0.0
    """Weight decay of the ODE's own AdamW."""
    clip: float = 1.0
    """Largest gradient norm of the ODE's parameters."""
    max_residual: float = 4.0
    """Guard: the run stops, naming t, when the learned part |log theta - log theta_ntk| grows beyond this."""
    tolerance: float = 1e-6
    """Largest error in log theta that the solver's grid may have, checked by step doubling."""
    check_every: int = 100
    """Optimizer steps between two checks of the solver's grid."""
    log_scale: LogScale = LogScale.off
    """Attention logits times log(n)/log(L) beyond L: in evaluation only, always, or the official code's variant."""
    official_ntk_base: bool = False
    """The vector field sees log theta_ntk at base 10000 whatever the model's base, as in the official code."""

    def __post_init__(self) -> None:
        require(
            self.name not in EVALUATION_ONLY,
            "scaling.name",
            self.name.name,
            f"reads a model in evaluation (evaluation.methods); train by {', '.join(each.name for each in TRAINED_BY)}",
        )
        require_at_most(self, "scaling.", MOST)
        require(self.t_max >= 1, "scaling.t_max", self.t_max, "a scale factor is at least 1")
        require(self.t_factor >= 1, "scaling.t_factor", self.t_factor, "1 or more")
        require(self.factor is None or self.factor >= 1, "scaling.factor", self.factor, "a scale factor is at least 1")
        require(
            self.factor is None or self.name in FORMULAS,
            "scaling.factor",
            self.factor,
            f"scaling={self.name.name} has none: `clex` serves up to scaling.t_max, `none` changes nothing",
        )
        require(
            not self.options or self.name in FORMULAS,
            "scaling.options",
            self.options,
            f"scaling={self.name.name} has none; leave the key out",
        )
        require(self.rope_theta > 1, "scaling.rope_theta", self.rope_theta, "greater than 1")
        require(
            self.name is not Method.random_pos or self.positions is not Positions.plain,
            "scaling.positions",
            self.positions.name,
            "random_pos with plain positions is scaling=none; take random",
        )
        require(
            self.name not in FORMULAS or self.log_scale is LogScale.off,
            "scaling.log_scale",
            self.log_scale.name,
            f"the stock config.json of scaling={self.name.name} cannot say it; leave it off",
        )
        require(0 <= self.mix_random <= 1, "scaling.mix_random", self.mix_random, "a probability between 0 and 1")
        require(self.max_chunks >= 2, "scaling.max_chunks", self.max_chunks, "at least 2 chunks")
        require(self.param_factor > 0, "scaling.param_factor", self.param_factor, "greater than 0")
        require(self.lr_scale >= 0, "scaling.lr_scale", self.lr_scale, "0 or more")
        require(self.weight_decay >= 0, "scaling.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "scaling.clip", self.clip, "greater than 0")
        require(self.max_residual > 0, "scaling.max_residual", self.max_residual, "greater than 0")
        require(1e-12 <= self.tolerance <= 1e-2, "scaling.tolerance", self.tolerance, "between 1e-12 and 1e-2")
        require(self.check_every >= 1, "scaling.check_every", self.check_every, "at least 1 step")

    def method_settings(self) -> dict[str, Any]:
        """The keys of this group that are settings of a method, by the field of its class."""
        return {"rope_theta": self.rope_theta, "longrope_factors": self.longrope_factors}

    def factor_for(self, row_len: int, context_len: int) -> float:
        """The scale factor t of a recipe by formula that trains on rows of `row_len` tokens; L is `context_len`."""
        if self.factor is not None:
            return self.factor
        longer = row_len > context_len and self.name is not Method.random_pos
        return row_len / context_len if longer else self.t_max
