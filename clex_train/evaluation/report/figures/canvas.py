"""What all figures share: their sizes, their colours, and names of lines that never touch each other.

Every figure is drawn for a wide and for a narrow screen. Twelve lines are told apart without colour too: by marker,
by dashes and by the name at their end (wide) or in the legend below (narrow). The hues are those of Okabe and Ito
(Color Universal Design, 2008) without its yellow, which is too pale for a line, and with a brown and a violet.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy.optimize import isotonic_regression

from clex_train.evaluation.report.cells import times

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7b61b5")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
INK, GREY, GRID = "#333333", "#666666", "#dddddd"
CELL_INK = "#1a1a1a"
"""On a pale cell, on a light and on a dark page alike."""
MOST_CHARACTERS = 36
LINE_SPACING = 1.3
POINT = 1 / 72


@dataclass(frozen=True)
class Style:
    """How a line looks."""

    color: str
    marker: str
    dashes: Any
    hollow: bool


def style(index: int) -> Style:
    """The look of the `index`-th line: 24 that differ, the first 8 in colour."""
    turn, place = divmod(index, len(COLORS))
    return Style(COLORS[place], MARKERS[place], DASHES[turn % len(DASHES)], turn % 2 == 1)


@dataclass(frozen=True)
class Line:
    """One named line of a figure."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Style
    emphasis: bool = False
    """Drawn thicker: what was learned."""
    errors: np.ndarray | None = None
    """Standard error of each y."""
    markers: bool = True


@dataclass(frozen=True)
class Canvas:
    """The page that a figure is drawn on."""

    width: float
    """Inches."""
    height: float
    """Inches of a figure of one panel."""
    font: float
    """Points."""
    columns: int
    """Panels side by side, at most."""
    name_lines: Callable[["Canvas", Axes, Sequence[Line]], None]

    def figure(self, height: float) -> Figure:
        """An empty figure, `height` in inches; a name below the axes is added to it."""
        return Figure(figsize=(self.width, height), dpi=150, layout="constrained")


@contextmanager
def drawing(canvas: Canvas, salt: str) -> Iterator[None]:
    """matplotlib's settings for one figure; `salt` keeps the ids of one SVG apart from those of another."""
    settings: dict[str, Any] = {
        "font.size": canvas.font,
        "axes.titlesize": canvas.font + 1,
        "axes.labelsize": canvas.font,
        "legend.fontsize": canvas.font,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(settings):
        yield


def plot(axes: Axes, line: Line) -> None:
    """Draw one line, with bars of one standard error where they are known."""
    look = line.style
    if line.errors is not None:
        axes.errorbar(line.x, line.y, line.errors, fmt="none", ecolor=look.color, elinewidth=1, capsize=2.5, zorder=2)
    axes.plot(
        line.x,
        line.y,
        color=look.color,
        linestyle=look.dashes,
        marker=look.marker if line.markers else None,
        markersize=6,
        markerfacecolor="none" if look.hollow else look.color,
        linewidth=2.6 if line.emphasis else 1.5,
        zorder=4 if line.emphasis else 3,
    )


def beside(canvas: Canvas, axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name to the right of the axes, at the height where it ends, moved apart where two would touch.

    The heights are the least squares solution under the distance of a line of text: an isotonic regression.
    """
    named = [line for line in lines if len(line.y)]
    if not named:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes are drawn on a figure"
    figure.draw_without_rendering()
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(li.x[-1], li.y[-1]) for li in named]))
    height = axes.bbox.height / figure.dpi / POINT
    font = min(canvas.font, height / (LINE_SPACING * len(named)))
    order = np.argsort(ends[:, 1], kind="stable")
    heights = spread(ends[order, 1], LINE_SPACING * font / height)
    for index, y in zip(order, heights, strict=True):
        line, end = named[index], ends[index]
        color, weight = line.style.color, "bold" if line.emphasis else "normal"
        if abs(y - end[1]) > 0.01 or end[0] < 0.99:
            start = (end[0], min(1.0, max(0.0, end[1])))
            kwargs = {"color": color, "linewidth": 0.7, "alpha": 0.6, "clip_on": False, "transform": axes.transAxes}
            axes.add_artist(Line2D([start[0], 1.025], [start[1], y], **kwargs))
        axes.text(1.03, y, plain(line.label), transform=axes.transAxes, va="center", fontsize=font, color=color,
                  fontweight=weight)  # fmt: skip


def spread(heights: np.ndarray, distance: float) -> np.ndarray:
    """Ascending heights [n] in 0..1 moved as little as possible until neighbours are `distance` apart."""
    steps = distance * np.arange(len(heights))
    room = max(0.0, 1 - float(steps[-1]))
    moved: np.ndarray = np.clip(isotonic_regression(heights - steps).x, 0, room) + steps
    return moved


def below(canvas: Canvas, axes: Axes, lines: Sequence[Line]) -> None:
    """Write the lines' names into a legend below the axes; the figure grows by its height."""
    handles = [
        Line2D(
            [],
            [],
            color=line.style.color,
            linestyle=line.style.dashes,
            marker=line.style.marker if line.markers else None,
            markerfacecolor="none" if line.style.hollow else line.style.color,
            linewidth=2.6 if line.emphasis else 1.5,
        )
        for line in lines
    ]
    names = [plain(line.label) for line in lines]
    columns = 2 if max(map(len, names), default=0) <= 20 else 1
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes are drawn on a figure"
    figure.set_figheight(figure.get_figheight() + 1.45 * canvas.font * POINT * math.ceil(len(names) / columns))
    figure.legend(
        handles, names, loc="outside lower left", ncols=columns, frameon=False, borderpad=0, labelspacing=0.35
    )


def plain(label: str, most: int = MOST_CHARACTERS) -> str:
    """A label as matplotlib shows it letter by letter: of bounded length, no mathematics, not hidden."""
    short = label if len(label) <= most else f"{label[: most - 1]}…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def tidy(axes: Axes) -> None:
    """No frame but the two axes, and faint lines at the ticks of y."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def lengths_on_x(canvas: Canvas, axes: Axes, lengths: Sequence[int], context_len: int | None) -> None:
    """A log2 axis with a tick at each length, as tokens and as a multiple of L; fewer ticks where they would touch."""
    most = max(2, int(canvas.width / (0.075 * canvas.font)))
    every = math.ceil(len(lengths) / most)
    ticks = list(lengths)[::-1][::every][::-1]
    names = [f"{tokens(n)}\n{times(n, context_len)}" if context_len else tokens(n) for n in ticks]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())


def powers_on_x(axes: Axes) -> None:
    """A log2 axis with ticks at powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def logarithmic_y_if_wide(axes: Axes, values: Sequence[float], ratio: float = 4.0) -> None:
    """A logarithmic axis for positive values whose largest is more than `ratio` times the smallest."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known or max(known) <= ratio * min(known):
        return
    decades = math.log10(max(known) / min(known))
    subs = (1, 2, 3, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def steps_on_x(axes: Axes) -> None:
    """Optimizer steps as whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer step")


def mark_training_length(canvas: Canvas, axes: Axes, context_lens: Sequence[int]) -> None:
    """A dashed line at each length that a model was trained on, named at its top."""
    for row, context_len in enumerate(context_lens):
        axes.axvline(context_len, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        axes.annotate(
            f"trained at {tokens(context_len)}",
            (context_len, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, 3 + row * LINE_SPACING * canvas.font),
            textcoords="offset points",
            va="bottom",
            fontsize=canvas.font - 1,
            color=GREY,
        )


def tokens(length: int) -> str:
    """65536 -> 64k: powers of two are how lengths are spoken of."""
    if length >= 2**20 and length % 2**20 == 0:
        return f"{length // 2**20}M"
    if length >= 8192 and length % 1024 == 0:
        return f"{length // 1024}k"
    return f"{length:,}"


def _number(value: float) -> str:
    if 1e-3 <= value < 1e7:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


WIDE = Canvas(width=9.0, height=4.4, font=10, columns=3, name_lines=beside)
NARROW = Canvas(width=4.2, height=3.2, font=9.5, columns=1, name_lines=below)
