"""How RoPE's frequencies are scaled, and how the ODE of CLEX is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.settings.bounds import require


class ScalingName(Enum):
    none = "none"
    clex = "clex"


class Positions(Enum):
    random = "random"
    uniform = "uniform"
    skip = "skip"
    mix = "mix"


class Activation(Enum):
    silu = "silu"
    tanh = "tanh"


class LogScale(Enum):
    off = "off"
    eval = "eval"
    always = "always"
    official = "official"


@dataclass
class ScalingConfig:
    name: ScalingName = ScalingName.none
    """`none` trains with the model's own RoPE; `clex` learns the frequencies as an ODE over the scale factor."""
    t_max: float = 16.0
    """Largest scale factor: each optimizer step draws t ~ U[1, t_max]; contexts up to t_max * L are served."""
    positions: Positions = Positions.mix
    """Where a row's tokens sit in [0, t*L): `random` (the paper), `uniform`, `skip` (chunks with gaps) or `mix`."""
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
        require(self.t_max >= 1, "scaling.t_max", self.t_max, "a scale factor is at least 1")
        require(0 <= self.mix_random <= 1, "scaling.mix_random", self.mix_random, "a probability between 0 and 1")
        require(self.max_chunks >= 2, "scaling.max_chunks", self.max_chunks, "at least 2 chunks")
        require(self.param_factor > 0, "scaling.param_factor", self.param_factor, "greater than 0")
        require(self.lr_scale >= 0, "scaling.lr_scale", self.lr_scale, "0 or more")
        require(self.weight_decay >= 0, "scaling.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "scaling.clip", self.clip, "greater than 0")
        require(self.max_residual > 0, "scaling.max_residual", self.max_residual, "greater than 0")
        require(1e-12 <= self.tolerance <= 1e-2, "scaling.tolerance", self.tolerance, "between 1e-12 and 1e-2")
        require(self.check_every >= 1, "scaling.check_every", self.check_every, "at least 1 step")
