"""CLEX with other vector fields than the paper's: the log-time field, and one learned direction.

    dv/du = a + act( tanh(v / B) W_up + (u / C) w + b ) W_down / H,    y = B tanh(v / B),    u = log(2t - 1), v(0) = 0

The paper's right side has a factor e^u / 2, so it grows with t, and reads sums of logarithms of size 10 to 37: it is
stiff, and learns only far below the model's rate. Here the inputs lie in [-1, 1] for any weights and t up to 27, |y| is
less than B, and the H hidden units enter as a mean, so that a step does not grow with their number. `a` is a learned
direction: with W_down = 0, one vector that moves with log t. Shapes: `P` pairs, `K` scale factors.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from clex_train.scaling.clex import Clex
from clex_train.scaling.solver import Field
from clex_train.scaling.spectrum import yarn_attention_factor
from clex_train.scaling.vector_field import ACTIVATIONS
from clex_train.utils.seeding import generator

BOUND = 4.0
"""B: no frequency moves by more than a factor of e^4 = 55 from its drift; `scaling.max_residual` allows as much."""
CLOCK = 4.0
"""C: u at t = 27.8, so that the clock is of unit size up to t = 32."""


@dataclass(frozen=True, eq=False)
class LogTimeField:
    """dv/du as a callable of (u, v)."""

    up: Float64[Tensor, "H P"]
    down: Float64[Tensor, "P H"]
    bias: Float64[Tensor, " H"]
    clock: Float64[Tensor, " H"]
    direction: Float64[Tensor, " P"]
    act: Callable[[Tensor], Tensor]

    def __call__(self, u: Tensor, v: Float64[Tensor, " P"]) -> Float64[Tensor, " P"]:
        hidden = torch.mv(self.up, torch.tanh(v / BOUND)) + self.clock * (float(u) / CLOCK) + self.bias
        return self.direction + torch.mv(self.down, self.act(hidden)) / len(hidden)


class LogTimeClex(Clex):
    """CLEX with the log-time field; an untrained one is its drift.

    `bias` and `clock` [H] start uniform in +-1, so that the hidden units differ in t before anything is learned;
    `direction` [P] starts at zero like `down`. `shares` [P] in [0, 1] replaces the NTK drift by YaRN's: a pair with
    share m is interpolated by 1 - m + m / t, and cos and sin are multiplied by 0.1 log t + 1 (arXiv 2309.00071).
    Zero shares mean no drift, and a factor of 1.

    Raises:
        ValueError: an argument is out of range, by name.
    """

    kind: ClassVar[str] = "log_time"
    shares: Tensor | None

    def __init__(
        self,
        inv_freq: Tensor,
        t_max: float,
        param_factor: float = 1.0,
        act: str = "silu",
        official_ntk_base: bool = False,
        tolerance: float = 1e-6,
        seed: int = 0,
        shares: Tensor | None = None,
    ) -> None:
        if official_ntk_base:
            raise ValueError("official_ntk_base: the log-time field reads no base; leave it out")
        super().__init__(inv_freq, t_max, param_factor, act, tolerance=tolerance, seed=seed)
        num_pairs, hidden = self.up.shape
        draws = generator(seed, "log_time_init").uniform(-1, 1, (2, hidden))
        bias, clock = torch.from_numpy(draws).to(torch.float32)
        self.bias, self.clock = nn.Parameter(bias), nn.Parameter(clock.clone())
        self.direction = nn.Parameter(torch.zeros(num_pairs))
        if shares is not None and not (len(shares) == num_pairs and bool(((shares >= 0) & (shares <= 1)).all())):
            raise ValueError(f"shares: expected {num_pairs} numbers from 0 to 1")
        # Part of the state, since they follow from the base's config and not from its frequencies.
        self.register_buffer("shares", None if shares is None else shares.detach().double().clone())

    @property
    def drift_name(self) -> str:
        """Name of the known path, `scaling.drift`."""
        if self.shares is None:
            return super().drift_name
        return "yarn" if bool(self.shares.any()) else "none"

    def attention_factor(self, t: float) -> float:
        """Return the factor on cos and sin at `t`: YaRN's 0.1 log t + 1 with its drift, else 1."""
        return yarn_attention_factor(t) if self.drift_name == "yarn" else 1.0

    def drift(self, t: Float64[Tensor, " K"]) -> Float64[Tensor, "K P"]:
        """Compute log theta(1) - log theta(t) of the known path: NTK's, or by `shares`."""
        return super().drift(t) if self.shares is None else -(1 - self.shares + self.shares / t[:, None]).log()

    def digest(self) -> str:
        """Return a fingerprint of everything that theta(t) depends on."""
        # Fields of two kinds may have equal weights, all zero at the start.
        shares = b"" if self.shares is None else self.shares.numpy().tobytes()
        parts = f"{self.kind} {super().digest()}".encode() + shares
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def _field(self) -> Field:
        # Transposed once for a solve, as in the paper's field.
        weights = {name: getattr(self, name).double() for name in ("bias", "clock", "direction")}
        return LogTimeField(self.up.double().t(), self.down.double().t(), **weights, act=ACTIVATIONS[self.act])

    def _bounded(self, y: Float64[Tensor, "*K P"]) -> Float64[Tensor, "*K P"]:
        """Map v to y = B tanh(v / B)."""
        return BOUND * torch.tanh(y / BOUND)


class DirectionClex(LogTimeClex):
    """The control without a network: y = B tanh(a u / B), one learned number a pair that moves with log t."""

    kind: ClassVar[str] = "direction"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, weight in self.named_parameters():
            # `down` is zero, so the network adds nothing, and frozen, so it stays that way.
            weight.requires_grad_(name == "direction")


FIELDS: dict[str, type[Clex]] = {cls.kind: cls for cls in (Clex, LogTimeClex, DirectionClex)}
"""Classes by the value of `scaling.field`; clex.json names one."""


@dataclass(frozen=True)
class Shape:
    """Arguments of a field besides its frequencies: those of clex.json, or the keys of `scaling`."""

    kind: str
    t_max: float
    param_factor: float
    act: str
    official_ntk_base: bool
    tolerance: float
    seed: int = 0

    def build(self, inv_freq: Float64[Tensor, " P"], shares: Float64[Tensor, " P"] | None = None) -> Clex:
        """Build the field with untrained weights; `shares` are those of its drift, None for NTK's.

        Raises:
            ValueError: an argument is out of range, by name, or the kind is unknown.
        """
        if self.kind not in FIELDS:
            raise ValueError(f"field={self.kind!r}: one of {', '.join(FIELDS)}")
        options: dict[str, Any] = {"official_ntk_base": self.official_ntk_base, "tolerance": self.tolerance}
        if shares is not None:
            options["shares"] = shares
        return FIELDS[self.kind](inv_freq, self.t_max, self.param_factor, self.act, seed=self.seed, **options)
