"""Perplexity against context length: one figure for each table, every row a line, the training length marked."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.figure import Figure as Drawing

from clex_train.evaluation.report.evidence import Evidence
from clex_train.evaluation.report.figures import canvas as page
from clex_train.evaluation.report.figures.canvas import Canvas, Line
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import of_evaluation
from clex_train.evaluation.report.table import Curve, Table


def figures(evidence: Evidence) -> Iterator[Figure | Absent]:
    """A figure for each table."""
    if not evidence.tables:
        yield Absent(
            "Perplexity against length",
            "the evaluations hold retrieval tasks alone",
            "python -m clex_train.cli.evaluate run=FOLDER protocols=[one_shot]",
        )
    drawn = [table for table in evidence.tables if _asks_for_lengths(table)]
    for index, table in enumerate(drawn or evidence.tables[:1]):
        sources = dict.fromkeys(of_evaluation(curve.path, curve.origin, evidence.runs) for curve in table.curves)
        name = "perplexity" if index == 0 else f"perplexity_{index + 1}"
        title = f"Perplexity against length: {table.title}"
        yield Figure(name, title, _caption(table), tuple(sources), partial(draw, table, None))
        top = lowest_part(table)
        if top is not None:
            title = f"The lowest of them, enlarged: {table.title}"
            yield Figure(f"{name}_enlarged", title, _caption(table), tuple(sources), partial(draw, table, top))


def _asks_for_lengths(table: Table) -> bool:
    """Not a stream, which is one length, nor `per_position`: their figure is the loss against position."""
    by_position = any(score.curve for curve in table.curves for score in curve.scores.values())
    return not by_position and any(len(curve.scores) > 1 for curve in table.curves)


def lowest_part(table: Table) -> float | None:
    """Where to cut the axis so that the good rows are seen apart, beside one that grows out of all proportion.

    At the best row's largest perplexity and half as much again; None unless a row goes eight times as high, and
    two rows at least stay below.
    """
    peaks = sorted(max(each.y) for curve in table.curves if len((each := line(curve, 0)).y) == len(table.lengths))
    if len(peaks) < 3:
        return None
    top = 1.5 * peaks[0]
    return float(top) if peaks[-1] > 8 * peaks[0] and peaks[1] < top else None


def draw(table: Table, top: float | None, canvas: Canvas) -> Drawing:
    """Lines over a log2 axis of length, up to `top`; else logarithmic where the values ask for it."""
    lines = [line(curve, index) for index, curve in enumerate(table.curves)]
    lines = [each for each in lines if len(each.y) and (top is None or min(each.y) <= top)]
    figure = canvas.figure(canvas.height)
    axes = figure.add_subplot()
    for each in lines:
        page.plot(axes, each)
    page.lengths_on_x(canvas, axes, table.lengths, table.context_len)
    values = [value for each in lines for value in each.y]
    if top is None:
        page.logarithmic_y_if_wide(axes, values)
    else:
        axes.set_ylim(min(values) - 0.04 * (top - min(values)), top)
    page.mark_training_length(canvas, axes, table.context_lens)
    page.tidy(axes)
    axes.set_xlabel("context length in tokens" + (", and as a multiple of L" if table.context_len else ""))
    axes.set_ylabel("perplexity (lower is better)")
    canvas.name_lines(canvas, axes, lines)
    return figure


def line(curve: Curve, index: int) -> Line:
    """A row as a line: the lengths where it is finite."""
    scores = [curve.scores[n] for n in sorted(curve.scores) if math.isfinite(curve.scores[n].perplexity)]
    errors = [score.standard_error for score in scores]
    return Line(
        label=curve.label,
        x=np.array([score.length for score in scores], dtype=np.float64),
        y=np.array([score.perplexity for score in scores]),
        style=page.style(index),
        emphasis=curve.learned,
        errors=np.array([error or 0.0 for error in errors]) if any(error is not None for error in errors) else None,
    )


def _caption(table: Table) -> str:
    parts = [f"{table.caption}."]
    if any(len(line(curve, 0).x) < len(curve.scores) for curve in table.curves):
        parts.append("Values that are not finite are left out.")
    if any(curve.learned for curve in table.curves):
        parts.append("Thick: learned frequencies.")
    return " ".join(parts)
