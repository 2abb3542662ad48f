"""Negative log-likelihood against the position of the predicted token: in a window, and along a stream.

In a window (Han et al., LM-Infinite, arXiv 2308.16137, figure 4) the evaluation has summed it in bins of positions
(protocol `per_position`). Along a stream its segments are those bins; the same tokens in windows of L, drawn beside
it, show what is the text's own.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clex_train.evaluation.report.evidence import Evidence
from clex_train.evaluation.report.figures import canvas as page
from clex_train.evaluation.report.figures.canvas import Canvas, Line
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import of_evaluation
from clex_train.evaluation.report.table import TOGETHER, Curve, Table
from clex_train.evaluation.results import Score

MOST_SEGMENTS = 128
STREAMS = {*TOGETHER, *TOGETHER.values()}


def figures(evidence: Evidence) -> Iterator[Figure | Absent]:
    """A figure for each table whose rows have a curve over positions."""
    drawn = [table for table in evidence.tables if _lines(table)]
    for index, table in enumerate(drawn):
        curves = [curve for curve in table.curves if _points(curve, table.windows) is not None]
        streamed = curves[0].protocol in STREAMS
        yield Figure(
            name="per_position" if index == 0 else f"per_position_{index + 1}",
            title=f"Loss against position: {table.title}",
            caption=f"{_what(table, streamed)}. {table.scored.partition(' on ')[2]}.",
            sources=tuple(dict.fromkeys(of_evaluation(curve.path, curve.origin, evidence.runs) for curve in curves)),
            draw=partial(draw, table),
        )
    if not drawn:
        yield Absent(
            "Loss against position",
            "no evaluation was made position by position",
            "python -m clex_train.cli.evaluate run=FOLDER protocols=[per_position]",
        )


def draw(table: Table, canvas: Canvas) -> Drawing:
    """Nats per token over the position in tokens."""
    lines = _lines(table)
    figure = canvas.figure(canvas.height)
    axes = figure.add_subplot()
    for line in lines:
        page.plot(axes, line)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 4, 5, 8, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: page.tokens(round(value))))
    page.mark_training_length(canvas, axes, table.context_lens)
    page.tidy(axes)
    axes.set_xlabel("position of the predicted token")
    axes.set_ylabel("nll in nats per token (lower is better)")
    canvas.name_lines(canvas, axes, lines)
    return figure


def _lines(table: Table) -> list[Line]:
    lines = []
    for index, curve in enumerate(table.curves):
        points = _points(curve, table.windows)
        if points is not None:
            x, y = points
            lines.append(Line(curve.label, x, y, page.style(index), curve.learned, markers=len(x) <= 32))
    return lines


def _points(curve: Curve, windows: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions and mean nll of a row's longest window or of its stream; None for a row without."""
    score = curve.scores[max(curve.scores)]
    points = _of_stream(score, windows) if curve.protocol in STREAMS else _of_window(score.curve)
    if points is None:
        return None
    known = np.isfinite(points[1])
    return points[0][known], points[1][known]


def _of_window(bins: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray] | None:
    """[position, mean nll, scored tokens] of each bin, as the evaluation wrote them."""
    if not bins:
        return None
    rows = np.array(bins, dtype=np.float64)
    return rows[:, 0], rows[:, 1]


def _of_stream(score: Score, windows: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The means of neighbouring segments of equal length, at their middles."""
    sums = np.array(score.window_nll)
    scored = score.num_tokens / len(sums)
    parts = np.array_split(np.arange(len(sums)), min(MOST_SEGMENTS, len(sums)))
    middles = [(part[0] + part[-1] + 1) / 2 * windows["length"] for part in parts]
    return np.array(middles), np.array([sums[part].mean() / scored for part in parts])


def _what(table: Table, streamed: bool) -> str:
    if streamed:
        return "Mean negative log-likelihood along the stream"
    return f"Mean negative log-likelihood in windows of {table.lengths[-1]:,} tokens"
