"""Frequency table: theta(t) on a grid of scale factors, computed once and stored.

Evaluation, generation and export read the same table, so no two of them integrate the ODE differently.
Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

import bisect
import itertools
import math
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clex_train.scaling.spectrum import Spectrum
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import require_regular

# Scale factors this close are equal: room for the rounding of n / L and of decimal grids, far below one token.
RELATIVE_SLACK = 1e-12
TABLE = "frequencies.safetensors"
"""Name of a table's file in a model directory."""
MAX_FACTORS = 2**17
"""Scale factors of a grid; with 64 pairs their frequencies take 64 MiB."""


@typing.runtime_checkable
class Frequencies(typing.Protocol):
    """Frequencies by length: a `FrequencyTable`, or a model's own at each number of tokens."""

    @property
    def method(self) -> str:
        """Name of the scaling method."""

    @property
    def context_len(self) -> int | None:
        """L in tokens; None if any will do."""

    @property
    def num_pairs(self) -> int:
        """P, half the rotary dimension."""

    @property
    def t_max(self) -> float:
        """Largest scale factor."""

    def at(self, t: float) -> Spectrum:
        """Return the spectrum at a scale factor."""

    def least_upper_bound(self, num_tokens: int, context_len: int, clamp: bool = False) -> Spectrum:
        """Return the spectrum for a call of `num_tokens` tokens."""


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """theta(t) for scale factors `t` [K] (ascending from 1) as `inv_freq` [K, P], float64, radians per token.

    `method` names the scaling (`clex`, `ntk`, ...), `digest` the weights it was solved from, `context_len` is L in
    tokens. `attention_factors` [K] float64 multiply cos and sin at each t (None: 1 everywhere). At inference, a call
    uses the t of a context `t_factor` times as long, capped at t_max. A model without RoPE has P = 0.

    Raises:
        ValueError: the grid does not ascend from 1; frequencies or factors are not finite and positive (a pair may be 0
            at every t); the number of factors differs; `t_factor` is below 1.
    """

    t: Float64[Tensor, " K"]
    inv_freq: Float64[Tensor, "K P"]
    method: str = ""
    context_len: int | None = None
    digest: str = ""
    attention_factors: Float64[Tensor, " K"] | None = None
    t_factor: float = 1.0
    _grid: list[float] = field(init=False, repr=False)
    _spectra: list[Spectrum] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        grid = self.t.tolist()
        if not grid or grid[0] != 1.0 or any(a >= b for a, b in itertools.pairwise(grid)):
            raise ValueError(f"t={_abbreviate(grid)}: the scale factors of a table must ascend from 1")
        # A pair that the model never rotates (Gemma 4) has frequency 0 at every t.
        is_still = (self.inv_freq == 0).all(dim=0)
        good = torch.isfinite(self.inv_freq) & ((self.inv_freq > 0) | is_still)
        if not bool(good.all()):
            row, column = (~good).nonzero()[0].tolist()
            value = float(self.inv_freq[row, column])
            raise ValueError(
                f"inv_freq[{row}, {column}]={value} at t={grid[row]:g}: frequencies must be finite and positive"
            )
        if not 1 <= self.t_factor < math.inf:
            raise ValueError(f"t_factor={self.t_factor}: must be finite and at least 1")
        factors = self._checked_factors(grid)
        spectra = [Spectrum(theta, t, a) for theta, t, a in zip(self.inv_freq, grid, factors, strict=True)]
        # Python floats and ready spectra: a decoding step looks them up without touching a tensor.
        object.__setattr__(self, "_grid", grid)
        object.__setattr__(self, "_spectra", spectra)

    @property
    def num_pairs(self) -> int:
        """P, half the rotary dimension."""
        return self.inv_freq.shape[1]

    @property
    def t_max(self) -> float:
        """Largest scale factor of the grid."""
        return self._grid[-1]

    def at(self, t: float) -> Spectrum:
        """Return the spectrum at a member of the grid; `ValueError` names the neighbours of any other `t`."""
        index = bisect.bisect_left(self._grid, t * (1 - RELATIVE_SLACK))
        if index < len(self._grid) and self._grid[index] <= t * (1 + RELATIVE_SLACK):
            return self._spectra[index]
        around = ", ".join(f"{s:g}" for s in self._grid[max(0, index - 1) : index + 1])
        raise ValueError(f"t={t:g}: not on the table's grid of {len(self._grid)} scale factors (nearest: {around})")

    def least_upper_bound(self, num_tokens: int, context_len: int, clamp: bool = False) -> Spectrum:
        """Return the spectrum of the least grid `t >= t_factor * num_tokens / context_len`, at most t_max.

        The same object is returned for the same `t`, so callers may compare by identity.

        Raises:
            ConfigError: `num_tokens / context_len` exceeds `t_max` without `clamp`.
        """
        needed = num_tokens / context_len * (1 - RELATIVE_SLACK)
        if needed > self._grid[-1] and not clamp:
            raise ConfigError(
                "num_tokens",
                num_tokens,
                f"beyond t_max * L = {self.t_max:g} * {context_len} = "
                f"{self.t_max * context_len:.0f} tokens; raise scaling.t_max, shorten the input or allow clamping",
            )
        # `t_factor` may push t to the cap, but does not make a length invalid.
        index = bisect.bisect_left(self._grid, self.t_factor * needed)
        return self._spectra[min(index, len(self._grid) - 1)]

    def to(self, device: torch.device | str) -> "FrequencyTable":
        """Return the same table on another device."""
        factors = None if self.attention_factors is None else self.attention_factors.to(device)
        return replace(self, t=self.t.to(device), inv_freq=self.inv_freq.to(device), attention_factors=factors)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, with names and lengths in its metadata."""
        metadata = {"method": self.method, "digest": self.digest}
        if self.context_len is not None:
            metadata["context_len"] = str(self.context_len)
        if self.t_factor != 1:
            # Metadata values are strings; `repr` round-trips a float exactly.
            metadata["t_factor"] = repr(self.t_factor)
        tensors = {"t": self.t, "inv_freq": self.inv_freq}
        if self.attention_factors is not None:
            tensors["attention_factors"] = self.attention_factors
        save_file({name: each.cpu().contiguous() for name, each in tensors.items()}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str) -> "FrequencyTable":
        """Read what `save` wrote, to the bit; `ConfigError` names a file that is not a frequency table."""
        try:
            require_regular(Path(path))
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Earlier versions stored a single attention factor for all t in the metadata.
            length, one_factor = metadata.get("context_len"), float(metadata.get("attention_factor", "1"))
            if any(each.dtype != torch.float64 for each in tensors.values()):
                raise ValueError("its tensors must be float64")
            if tensors["inv_freq"].shape != (len(tensors["t"]), tensors["inv_freq"].shape[-1]):
                raise ValueError("`inv_freq` must have one row per scale factor")
            factors = tensors.get("attention_factors")
            if factors is None and one_factor != 1.0:
                factors = torch.full_like(tensors["t"], one_factor)
            return cls(
                t=tensors["t"],
                inv_freq=tensors["inv_freq"],
                method=metadata.get("method", ""),
                context_len=None if length is None else int(length),
                digest=metadata.get("digest", ""),
                attention_factors=factors,
                t_factor=float(metadata.get("t_factor", "1")),
            )
        except Exception as error:  # safetensors and torch raise any type for tensors of other shapes and types
            raise ConfigError(path, None, f"not a frequency table ({first_line(error)}); copy it again") from error

    def _checked_factors(self, grid: list[float]) -> list[float]:
        if self.attention_factors is None:
            return [1.0] * len(grid)
        factors = self.attention_factors.tolist()
        if len(factors) != len(grid) or not all(0 < factor < math.inf for factor in factors):
            raise ValueError(
                f"attention_factors={_abbreviate(factors)}: one for each of {len(grid)} scale factors, "
                "finite and positive"
            )
        return factors


def scale_grid(t_max: float, step: float = 1.0) -> Float64[Tensor, " K"]:
    """Build the scale factors 1, 1 + step, ..., with `t_max` always last; integers by default."""
    if not t_max >= 1:
        raise ValueError(f"t_max={t_max}: a scale factor must be at least 1")
    if not step > 0:
        raise ValueError(f"step={step}: the spacing of scale factors must be greater than 0")
    if not (t_max - 1) / step < MAX_FACTORS:
        raise ConfigError("t_max", t_max, f"more than {MAX_FACTORS:,} scale factors in steps of {step:g}; lower it")
    grid = 1 + step * torch.arange(int((t_max - 1) / step) + 1, dtype=torch.float64)
    # Drop a point that differs from t_max by rounding only, or the grid would hold it twice.
    inside = grid[grid < t_max * (1 - RELATIVE_SLACK)]
    return torch.cat((inside, torch.tensor([t_max], dtype=torch.float64)))


def as_grid(t_grid: Tensor | list[float] | tuple[float, ...]) -> Float64[Tensor, " K"]:
    """Convert scale factors to a float64 vector."""
    return torch.as_tensor(t_grid, dtype=torch.float64)


def _abbreviate(grid: list[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in grid[:6])
    return f"[{shown}{', ...' if len(grid) > 6 else ''}]"
