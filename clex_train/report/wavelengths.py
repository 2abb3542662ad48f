"""Draw the wavelengths of a model's RoPE by pair, for each layer type, with those of a second model."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from clex_train.inspection import spectra
from clex_train.inspection.reading import Reading
from clex_train.report import plotting
from clex_train.report.plotting import GREY, Line


def to_png(reading: Reading, other: Reading | None = None) -> bytes:
    """Draw the figure as PNG."""
    buffer = io.BytesIO()
    with plotting.style("wavelengths"):
        drawn = draw(reading, other)
        title = f"Wavelengths of {reading.name} at {reading.length:,} tokens"
        drawn.suptitle(plotting.as_text(title, plotting.MAX_TITLE), x=0.01, ha="left", fontsize=12)
        drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(reading: Reading, other: Reading | None = None) -> Drawing:
    """Draw tokens of a full turn by pair, on a logarithmic axis, with lines at L and at the length read for."""
    figure, panels = plotting.new_figure()
    axes = panels[0, 0]
    plotting.draw_lines(axes, [*_lines(reading), *([] if other is None else _lines(other))])
    axes.set_yscale("log")
    axes.set_ylabel("tokens of a full turn")
    axes.set_xlabel("pair j, from the fastest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if reading.context_len is not None:
        _mark(axes, reading.context_len.length, "L")
    if reading.context_len is None or reading.length != reading.context_len.length:
        _mark(axes, reading.length, "read for")
    return figure


def _lines(reading: Reading) -> Iterator[Line]:
    """Yield config.json's wavelengths, thick those of a CLEX field, and plain RoPE's where they differ."""
    for rope in reading.ropes:
        of = f", {rope.name}" if rope.name else ""
        if reading.field is not None and reading.scales(rope):
            yield _line(f"{_name(reading)}, t = {reading.field.spectrum.t:g}{of}", reading.inv_freq(rope), True)
        yield _line(f"{_name(reading)}{of}", rope.inv_freq, False)
        if rope.plain is not None and rope.is_scaled:
            yield _line(f"rope_theta {rope.rope_theta:g}{of}", rope.plain, False)


def _line(label: str, inv_freq: Tensor, learned: bool) -> Line:
    turns = spectra.wavelengths(inv_freq).numpy()
    # A pair that never turns has no place on a logarithmic axis.
    y = np.where((turns < 1e15) & np.isfinite(turns), turns, math.nan)
    return Line(label, np.arange(len(y)), y, learned, markers=len(y) <= 16)


def _name(reading: Reading) -> str:
    # Every run ends in `final/`, so the run's own folder tells two of them apart.
    parts = reading.name.rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == "final" else parts[-1:])


def _mark(axes: Axes, length: int, name: str) -> None:
    axes.axhline(length, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    text = f"{name} {plotting.format_tokens(length)}"
    axes.annotate(text, (0, length), xycoords=("axes fraction", "data"), xytext=(4, 3), color=GREY, fontsize=8,
                  textcoords="offset points")  # fmt: skip
