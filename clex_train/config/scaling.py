"""Config group `scaling`: the RoPE scaling method, and the training of CLEX's ODE."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from clex_train.config.method import EVALUATION_ONLY, FORMULAS, TRAINED_BY, Method
from clex_train.utils.bounds import MOST_ROPE_THETA, MOST_SCALE, MOST_STEPS, MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


class Positions(Enum):
    """Ways of sampling positions in training."""

    plain = "plain"
    random = "random"
    uniform = "uniform"
    skip = "skip"
    mix = "mix"


class Distribution(Enum):
    """Distributions of the scale factor t."""

    uniform = "uniform"
    log_uniform = "log_uniform"


class Activation(Enum):
    """Activations of the vector field."""

    silu = "silu"
    tanh = "tanh"


class FieldKind(Enum):
    """Vector fields of the ODE."""

    paper = "paper"
    log_time = "log_time"
    direction = "direction"


class Drift(Enum):
    """Known paths of the frequencies, to which the field adds what it learns."""

    ntk = "ntk"
    yarn = "yarn"
    none = "none"


class LogScale(Enum):
    """Policies of scaling attention logits with the log of the length."""

    off = "off"
    eval = "eval"
    always = "always"
    official = "official"
    token_eval = "token_eval"
    token = "token"

    @property
    def counts_each_token(self) -> bool:
        """True if a query has the factor of the keys that it sees itself, instead of one factor for the call."""
        return self in (LogScale.token_eval, LogScale.token)


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
"""Upper bounds that catch typing errors."""


@dataclass
class ScalingConfig:
    """The `scaling` group: method, t, vector field, solver, positions."""

    name: Method = dataclasses.field(default=Method.none, metadata={"choices": TRAINED_BY})
    """`none` trains with the model's own RoPE; `clex` learns the frequencies as an ODE over the scale factor; the
    others compute them by a formula (docs/recipes.md)."""
    t_max: float = 16.0
    """Largest scale factor, at least 1: each step draws t from [1, t_max], and contexts up to t_max * L are served."""
    t_factor: float = 1.0
    """At inference, use the t of a context `t_factor` times as long, capped at t_max; training ignores it."""
    final_t: float | None = None
    """t in [1, t_max] that the `config.json` of `final/` states for programs without CLEX; null: t_max. `clex_train`
    ignores it: there t follows the length."""
    t_distribution: Distribution = Distribution.uniform
    """Distribution of t in CLEX: `uniform` (the paper) or `log_uniform` (equal weight on each doubling)."""
    factor: float | None = None
    """Scale factor of a formula, at least 1: contexts up to factor * L. null: the one that fits rows longer than L,
    else t_max; always t_max for `random_pos`."""
    rope_theta: float = 1e6
    """RoPE base for `theta`, above 1 (default: Code Llama's)."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` (up to L) and `long_factor` (beyond): one number per rotated pair."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of a method without a key here, as `scaling.options.NAME=value`: the fields of its class in
    `clex_train/scaling/methods`."""
    positions: Positions = Positions.mix
    """Positions of a row's tokens in [0, t*L): `random` (the paper), `uniform`, `skip` (chunks with gaps), `mix` of
    random and skip, or `plain` (0, 1, 2, ...)."""
    mix_random: float = 0.25
    """Share of rows with `random` positions under `mix`, in [0, 1]; the others use `skip`."""
    max_chunks: int = 8
    """Contiguous chunks of a row under `skip` at most, at least 2."""
    as_used: float = 0.0
    """Share of steps, in [0, 1], that train what inference reads for a row of n tokens: plain positions, and in CLEX
    t = `t_factor` * n / L (at least 1, at most t_max). The other steps draw t and sample positions."""
    field: FieldKind = FieldKind.paper
    """Vector field: `paper`; `log_time`, bounded and of unit size in the clock log(2t - 1), which learns at the model's
    rate; `direction`, one learned number a pair that moves with log t, a control."""
    drift: Drift = Drift.ntk
    """Path of the frequencies before anything is learned: `ntk` (the paper's), `yarn` (by parts, with its attention
    factor), or `none`. The paper's field has `ntk`."""
    param_factor: float = 1.0
    """Width of the vector field's hidden layer divided by the rotary dimension (lambda in the paper), above 0."""
    act: Activation = Activation.silu
    """Activation of the vector field."""
    lr_scale: float = 0.05
    """Learning rate of the ODE relative to the model's, 0 or more; 0 freezes the field at its drift."""
    weight_decay: float = 0.0
    """Weight decay of the ODE's own AdamW, 0 or more."""
    clip: float = 1.0
    """Maximum gradient norm of the ODE's parameters, above 0."""
    max_residual: float = 4.0
    """Guard: stop the run, naming t, when the learned part |log theta - log theta_drift| exceeds this; above 0."""
    tolerance: float = 1e-6
    """Maximum error in log theta of the solver's grid, checked by step doubling; 1e-12 to 1e-2."""
    check_every: int = 100
    """Optimizer steps between checks of the solver's grid, at least 1."""
    log_scale: LogScale = LogScale.off
    """Multiply attention logits by log(n)/log(L) beyond L: only in evaluation (`eval`), `always`, or the `official`
    variant, n the tokens of the sequence; or by the keys that each query sees itself, only in evaluation (`token_eval`)
    or always (`token`), which no `config.json` expresses."""
    official_ntk_base: bool = False
    """Feed the vector field log theta_ntk at base 10000 for any model, as in the official code."""

    def __post_init__(self) -> None:
        require(
            self.name not in EVALUATION_ONLY,
            "scaling.name",
            self.name.name,
            f"reads a model in evaluation (evaluation.methods); train by {', '.join(each.name for each in TRAINED_BY)}",
        )
        require_at_most(self, "scaling.", MOST)
        self._require_scale_factors()
        self._require_positions()
        self._require_field()
        # A stock config.json cannot express what is refused below, so the exported model would differ from the run.
        require(
            # A factor that the method does not read would look as if it had an effect.
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
            # Plain positions make RandomPos identical to no scaling, which the label would hide.
            self.name is not Method.random_pos or self.positions is not Positions.plain,
            "scaling.positions",
            self.positions.name,
            "random_pos with plain positions is scaling=none; use random",
        )
        require(
            self.name not in FORMULAS or self.log_scale is LogScale.off,
            "scaling.log_scale",
            self.log_scale.name,
            f"the stock config.json of scaling={self.name.name} cannot express it; leave it off",
        )
        require(self.param_factor > 0, "scaling.param_factor", self.param_factor, "greater than 0")
        require(self.lr_scale >= 0, "scaling.lr_scale", self.lr_scale, "0 or more")
        require(self.weight_decay >= 0, "scaling.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "scaling.clip", self.clip, "greater than 0")
        require(self.max_residual > 0, "scaling.max_residual", self.max_residual, "greater than 0")
        # Below 1e-12 rounding in float64 dominates, and no grid would pass the check.
        require(1e-12 <= self.tolerance <= 1e-2, "scaling.tolerance", self.tolerance, "between 1e-12 and 1e-2")
        require(self.check_every >= 1, "scaling.check_every", self.check_every, "at least 1 step")

    def _require_scale_factors(self) -> None:
        require(self.t_max >= 1, "scaling.t_max", self.t_max, "a scale factor is at least 1")
        require(self.t_factor >= 1, "scaling.t_factor", self.t_factor, "1 or more")
        require(
            self.final_t is None or (self.name is Method.clex and 1 <= self.final_t <= self.t_max),
            "scaling.final_t",
            self.final_t,
            f"from 1 to scaling.t_max={self.t_max:g}, for scaling=clex alone",
        )
        require(self.factor is None or self.factor >= 1, "scaling.factor", self.factor, "a scale factor is at least 1")

    def _require_positions(self) -> None:
        require(0 <= self.mix_random <= 1, "scaling.mix_random", self.mix_random, "a probability between 0 and 1")
        # With a single chunk there is no gap to skip.
        require(self.max_chunks >= 2, "scaling.max_chunks", self.max_chunks, "at least 2 chunks")
        require(0 <= self.as_used <= 1, "scaling.as_used", self.as_used, "a share of steps between 0 and 1")
        require(
            # Plain RoPE at plain positions is all that these steps train, so the key would have no effect.
            self.as_used == 0 or self.name is not Method.none,
            "scaling.as_used",
            self.as_used,
            "scaling=none trains every step as it is used; leave the key out",
        )

    def _require_field(self) -> None:
        is_paper = self.field is FieldKind.paper
        # The field of a run without CLEX would not exist, whatever the key says.
        remedy = f"scaling={self.name.name} has no field; use scaling=clex or leave the key out"
        require(is_paper or self.name is Method.clex, "scaling.field", self.field.name, remedy)
        remedy = "the paper's field knows NTK's drift alone; add scaling.field=log_time"
        require(not is_paper or self.drift is Drift.ntk, "scaling.drift", self.drift.name, remedy)
        remedy = f"scaling.field={self.field.name} reads no base; leave the key out"
        require(is_paper or not self.official_ntk_base, "scaling.official_ntk_base", self.official_ntk_base, remedy)

    def t_as_used(self, row_len: int, context_len: int) -> float:
        """Return the t that CLEX uses at inference for `row_len` tokens, with L = `context_len`."""
        return min(self.t_max, max(1.0, self.t_factor * row_len / context_len))

    def method_settings(self) -> dict[str, Any]:
        """Collect the keys of this group that are settings of a method, by the field of its class."""
        return {"rope_theta": self.rope_theta, "longrope_factors": self.longrope_factors}

    def factor_for(self, row_len: int, context_len: int) -> float:
        """Return the scale factor t of a formula that trains on rows of `row_len` tokens, with L = `context_len`."""
        if self.factor is not None:
            return self.factor
        # RandomPos needs positions beyond the row, so its factor never follows from the row length.
        longer = row_len > context_len and self.name is not Method.random_pos
        return row_len / context_len if longer else self.t_max
