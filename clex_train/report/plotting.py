"""Draw named lines in the style that all figures of a report share, and write a figure as PNG or SVG.

Hues are those of Okabe and Ito (Color Universal Design, 2008) without yellow, which is too pale for a line, and with a
brown and a violet. Markers differ too, so that lines are distinct in print and for readers who see few colors.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from clex_train.evaluation.tables import times

if TYPE_CHECKING:
    from clex_train.report.evidence import Source

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7b61b5")
MARKERS = "osD^vPX*"
INK, GREY, GRID = "#333333", "#666666", "#dddddd"
WIDTH, HEIGHT = 7.5, 3.8
"""Inches of a figure with one panel."""
MAX_LABEL, MAX_TITLE = 36, 90
"""Characters."""


@dataclass(frozen=True)
class Figure:
    """One figure of a report, not yet drawn."""

    name: str
    """Name of its PNG, without the suffix."""
    title: str
    caption: str
    sources: tuple[Source, ...]
    draw: Callable[[], Drawing]


@dataclass(frozen=True)
class Absent:
    """A figure that has no data."""

    title: str
    reason: str
    remedy: str
    """The command or setting that would give it data."""


@dataclass(frozen=True)
class Line:
    """One named line."""

    label: str
    x: np.ndarray
    y: np.ndarray
    learned: bool = False
    """Drawn thicker."""
    errors: np.ndarray | None = None
    """Standard error of each y."""
    markers: bool = True


def new_figure(rows: int = 1, columns: int = 1, height: float = HEIGHT) -> tuple[Drawing, np.ndarray]:
    """Create a figure with axes [rows, columns] that share both scales; `height` in inches."""
    figure = Drawing(figsize=(WIDTH, height), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_panels(lines: Sequence[Line]) -> tuple[Drawing, list[Axes]]:
    """Draw lines in panels of at most eight, so that each color is used once; the others are faint behind."""
    groups = np.array_split(np.arange(len(lines)), max(1, math.ceil(len(lines) / len(COLORS))))
    figure, panels = new_figure(len(groups), height=0.6 + (HEIGHT - 0.6) * len(groups))
    for axes, group in zip(panels[:, 0], groups, strict=True):
        others = [line for index, line in enumerate(lines) if index not in group]
        draw_lines(axes, [lines[index] for index in group], others)
    return figure, list(panels[:, 0])


def draw_lines(axes: Axes, lines: Sequence[Line], context: Sequence[Line] = ()) -> None:
    """Draw lines in colors of their own over the faint ones of `context`, and name the lines in a legend."""
    for line in context:
        axes.plot(line.x, line.y, color=GRID, linewidth=1, zorder=1)
    for index, line in enumerate(lines):
        look = _look(line, index)
        if line.errors is not None:
            color = look["color"]
            axes.errorbar(line.x, line.y, line.errors, fmt="none", ecolor=color, elinewidth=1, capsize=2.5, zorder=2)
        axes.plot(line.x, line.y, **look, zorder=4 if line.learned else 3)
    add_legend(axes, lines)


def add_legend(axes: Axes, lines: Sequence[Line]) -> None:
    """Name the lines to the right of the axes, in the order in which they end, from top to bottom."""
    ends = [line.y[-1] if len(line.y) else -math.inf for line in lines]
    order = sorted(range(len(lines)), key=lambda index: -ends[index])
    handles = [Line2D([], [], **_look(lines[index], index)) for index in order]
    labels = [as_text(lines[index].label) for index in order]
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _look(line: Line, index: int) -> dict[str, Any]:
    turn, place = divmod(index, len(COLORS))
    marker = MARKERS[place] if line.markers else None
    dashes = ("-", "--", ":")[turn % 3]
    width = 2.6 if line.learned else 1.5
    return {"color": COLORS[place], "marker": marker, "markersize": 5.5, "linewidth": width, "linestyle": dashes}


def as_text(label: str, most: int = MAX_LABEL) -> str:
    """Return a label that matplotlib shows letter by letter, cut to `most` characters."""
    short = label if len(label) <= most else f"{label[: most - 1]}…"
    # A leading underscore would hide the label, and two dollar signs would make it mathematics.
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def format_tokens(length: float) -> str:
    """Format a length in binary thousands: 65536 as 64k."""
    length = round(length)
    if length >= 2**20 and length % 2**20 == 0:
        return f"{length // 2**20}M"
    if length >= 8192 and length % 1024 == 0:
        return f"{length // 1024}k"
    return f"{length:,}"


def set_length_axis(axes: Axes, lengths: Sequence[int], context_len: int | None) -> None:
    """Scale x by log2 with ticks at the lengths, in tokens and multiples of L; at most eight, so that none touch."""
    every = math.ceil(len(lengths) / 8)
    ticks = list(lengths)[::-1][::every][::-1]
    names = [format_tokens(n) + (f"\n{times(n, context_len)}" if context_len else "") for n in ticks]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context length in tokens" + (", and as a multiple of L" if context_len else ""))


def set_logarithmic_if_wide(axes: Axes, values: Sequence[float], ratio: float = 4.0) -> None:
    """Scale y by log10 where the largest positive value is more than `ratio` times the smallest."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known or max(known) <= ratio * min(known):
        return
    decades = math.log10(max(known) / min(known))
    subs = (1, 2, 3, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e7 else f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def mark_training_lengths(axes: Axes, context_lens: Sequence[int]) -> None:
    """Draw a dashed line at each length that a model was trained on, named above the axes."""
    for row, context_len in enumerate(context_lens):
        axes.axvline(context_len, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        text, offset = f"trained at {format_tokens(context_len)}", (5, 3 + 12 * row)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom"}
        axes.annotate(text, (context_len, 1), xytext=offset, color=GREY, fontsize=8, **place)


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Set matplotlib's defaults for one figure; `salt` keeps the ids of its SVG apart from those of another."""
    sizes = dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), 9.0)
    inks = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    text = {"text.color": INK, "axes.labelcolor": INK, "svg.fonttype": "none", "svg.hashsalt": salt}
    with matplotlib.rc_context({"axes.titlesize": 10.0, **sizes, **inks, **text}):
        yield


def to_png(figure: Figure) -> bytes:
    """Draw a figure on white under its title: it will be seen without the page."""
    buffer = io.BytesIO()
    with style(figure.name):
        drawn = figure.draw()
        drawn.suptitle(as_text(figure.title, MAX_TITLE), x=0.01, ha="left", fontsize=12)
        drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """Draw a figure as an element inside a page: transparent, its text as text, without references to other files."""
    buffer = io.StringIO()
    with style(figure.name):
        figure.draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href").strip()
