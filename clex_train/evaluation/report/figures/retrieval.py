"""Retrieval: the share of prompts answered, by depth and length. One figure a task, a panel for each method.

Depth 0 is the start of the text. Tasks without a depth are in the table alone.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from clex_train.evaluation.report.evidence import Evidence, TaskScores
from clex_train.evaluation.report.figures import canvas as page
from clex_train.evaluation.report.figures.canvas import Canvas
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import of_evaluation

COLORMAP = "Blues"
DARKEST = 0.85
"""The part of the colour map that is used, so that the darkest cell is still blue."""
SHOWN_IN_WHITE = 0.6


def figures(evidence: Evidence) -> Iterator[Figure | Absent]:
    """A heat map for each task that was asked at several depths."""
    graded = [scores for scores in evidence.tasks if any(row.depth is not None for row in scores.rows)]
    for task in dict.fromkeys(scores.task for scores in graded):
        shown = [scores for scores in graded if scores.task == task]
        totals = sorted({row.total for scores in shown for row in scores.rows})
        prompts = f"{totals[0]}" if len(totals) == 1 else f"{totals[0]} to {totals[-1]}"
        yield Figure(
            name=f"retrieval_{re.sub(r'[^A-Za-z0-9]+', '_', task)}",
            title=f"Retrieval: {task}",
            caption=f"Percent of what was hidden that was found, by depth in the text and its length; "
            f"{prompts} prompts in each cell.",
            sources=tuple(dict.fromkeys(of_evaluation(s.path, s.origin, evidence.runs) for s in shown)),
            draw=partial(draw, shown),
        )
    if not graded:
        yield Absent(
            "Passkey and needle, depth against length",
            "no retrieval task was evaluated",
            "python -m clex_train.cli.evaluate run=FOLDER tasks=[passkey]",
        )


def draw(shown: Sequence[TaskScores], canvas: Canvas) -> Drawing:
    """Panels of cells, lengths to the right, depths downwards."""
    lengths = sorted({row.length for scores in shown for row in scores.rows})
    depths = sorted({row.depth for scores in shown for row in scores.rows if row.depth is not None})
    columns = min(len(shown), canvas.columns if len(lengths) <= 8 else 1)
    rows = -(-len(shown) // columns)
    figure = canvas.figure(rows * (0.75 + 0.26 * len(depths)) + 0.5)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, scores in zip(panels.flatten(), shown, strict=False):
        _panel(axes, canvas, scores, lengths, depths)
    for axes in panels.flatten()[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("depth")
    for axes in panels[-1]:
        axes.set_xlabel("length in tokens")
    return figure


def grid(scores: TaskScores, lengths: Sequence[int], depths: Sequence[float]) -> np.ndarray:
    """Scores float64 [depths, lengths] from 0 to 1; NaN where nothing was asked."""
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in scores.rows:
        if row.depth is not None:
            cells[depths.index(row.depth), lengths.index(row.length)] = row.score
    return cells


def _panel(axes: Axes, canvas: Canvas, scores: TaskScores, lengths: Sequence[int], depths: Sequence[float]) -> None:
    cells = grid(scores, lengths, depths)
    # The mesh is drawn cell by cell as vectors: an image would be embedded as a blurred bitmap.
    axes.pcolormesh(cells, cmap=COLORMAP, vmin=0, vmax=1 / DARKEST, edgecolors="white", linewidth=1)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "white" if value > SHOWN_IN_WHITE else page.CELL_INK
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=color,
                      fontsize=canvas.font - 1.5)  # fmt: skip
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [page.tokens(n) for n in lengths])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylim(len(depths), 0)
    axes.set_title(page.plain(scores.label), loc="left")
