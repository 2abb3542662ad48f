"""The frequency table: theta(t) on a grid of scale factors, computed once and stored.

Evaluation, generation and export all read one table, so that no two of them integrate the ODE differently.
Shapes: `K` scale factors, `P` pairs = rotary_dim / 2.
"""

import bisect
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clex_train.scaling.spectrum import Spectrum

# Two scale factors this close are the same one: room for the rounding of n / L and of decimal grids, far below a token.
RELATIVE_SLACK = 1e-12


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """theta(t) for scale factors `t` [K] (ascending, the first is 1) as `inv_freq` [K, P], float64, radians per token.

    `method` names what made it (`clex`, `ntk`, ...), `digest` the weights it was solved from, `context_len` is L in
    tokens. Raises `ValueError` for a grid that does not ascend from 1 and for frequencies not finite and positive.
    """

    t: Float64[Tensor, " K"]
    inv_freq: Float64[Tensor, "K P"]
    method: str = ""
    context_len: int | None = None
    digest: str = ""
    attention_factor: float = 1.0
    _grid: list[float] = field(init=False, repr=False)
    _spectra: list[Spectrum] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        grid = self.t.tolist()
        if not grid or grid[0] != 1.0 or any(a >= b for a, b in itertools.pairwise(grid)):
            raise ValueError(f"t={_short(grid)}: the scale factors of a table ascend, starting at 1")
        good = torch.isfinite(self.inv_freq) & (self.inv_freq > 0)
        if not bool(good.all()):
            row, column = (~good).nonzero()[0].tolist()
            value = float(self.inv_freq[row, column])
            raise ValueError(
                f"inv_freq[{row}, {column}]={value} at t={grid[row]:g}: frequencies are finite and positive"
            )
        spectra = [Spectrum(theta, t, self.attention_factor) for theta, t in zip(self.inv_freq, grid, strict=True)]
        object.__setattr__(self, "_grid", grid)
        object.__setattr__(self, "_spectra", spectra)

    @property
    def t_max(self) -> float:
        """The largest scale factor of the grid."""
        return self._grid[-1]

    def at(self, t: float) -> Spectrum:
        """The spectrum at a member of the grid; `ValueError` names its neighbours for a `t` that is none."""
        index = bisect.bisect_left(self._grid, t * (1 - RELATIVE_SLACK))
        if index < len(self._grid) and self._grid[index] <= t * (1 + RELATIVE_SLACK):
            return self._spectra[index]
        around = ", ".join(f"{s:g}" for s in self._grid[max(0, index - 1) : index + 1])
        raise ValueError(f"t={t:g}: not on the table's grid of {len(self._grid)} scale factors (nearest: {around})")

    def least_upper_bound(self, num_tokens: int, context_len: int, clamp: bool = False) -> Spectrum:
        """The spectrum of the least grid `t >= num_tokens / context_len`.

        Beyond `t_max` a `ValueError` names the numbers, or with `clamp` the last spectrum is given. The same object
        comes back for the same `t`, so callers may compare by identity.
        """
        index = bisect.bisect_left(self._grid, num_tokens / context_len * (1 - RELATIVE_SLACK))
        if index == len(self._grid) and not clamp:
            raise ValueError(
                f"num_tokens={num_tokens}: beyond t_max * L = {self.t_max:g} * {context_len} = "
                f"{self.t_max * context_len:.0f} tokens; raise scaling.t_max, shorten the input or allow clamping"
            )
        return self._spectra[min(index, len(self._grid) - 1)]

    def to(self, device: torch.device | str) -> "FrequencyTable":
        """The same table on another device."""
        return FrequencyTable(
            self.t.to(device),
            self.inv_freq.to(device),
            self.method,
            self.context_len,
            self.digest,
            self.attention_factor,
        )

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, the names in its metadata."""
        metadata = {"method": self.method, "digest": self.digest, "attention_factor": repr(self.attention_factor)}
        if self.context_len is not None:
            metadata["context_len"] = str(self.context_len)
        tensors = {"t": self.t.cpu().contiguous(), "inv_freq": self.inv_freq.cpu().contiguous()}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str) -> "FrequencyTable":
        """Read what `save` wrote, to the bit; `ValueError` names the file when it is no frequency table."""
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                t, inv_freq = file.get_tensor("t"), file.get_tensor("inv_freq")
            length = metadata.get("context_len")
            return cls(
                t=t,
                inv_freq=inv_freq,
                method=metadata.get("method", ""),
                context_len=None if length is None else int(length),
                digest=metadata.get("digest", ""),
                attention_factor=float(metadata.get("attention_factor", "1")),
            )
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a frequency table: {error}") from error


def scale_grid(t_max: float, step: float = 1.0) -> Float64[Tensor, " K"]:
    """Scale factors 1, 1 + step, ... with `t_max` always the last; integers by default."""
    if not t_max >= 1:
        raise ValueError(f"t_max={t_max}: a scale factor is at least 1")
    if not step > 0:
        raise ValueError(f"step={step}: the spacing of scale factors is greater than 0")
    grid = 1 + step * torch.arange(int((t_max - 1) / step) + 1, dtype=torch.float64)
    inside = grid[grid < t_max * (1 - RELATIVE_SLACK)]
    return torch.cat((inside, torch.tensor([t_max], dtype=torch.float64)))


def as_grid(t_grid: Tensor | list[float] | tuple[float, ...]) -> Float64[Tensor, " K"]:
    """Scale factors as a float64 vector."""
    return torch.as_tensor(t_grid, dtype=torch.float64)


def _short(grid: list[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in grid[:6])
    return f"[{shown}{', ...' if len(grid) > 6 else ''}]"
