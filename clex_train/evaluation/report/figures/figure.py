"""A figure of the report before it is drawn, and one that cannot be drawn, with what it lacks."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure as Drawing

from clex_train.evaluation.report.figures.canvas import Canvas
from clex_train.evaluation.report.sources import Source


@dataclass(frozen=True)
class Figure:
    """A figure, how to draw it, and where its numbers come from."""

    name: str
    """Name of its PNG, without the ending."""
    title: str
    caption: str
    sources: tuple[Source, ...]
    draw: Callable[[Canvas], Drawing]


@dataclass(frozen=True)
class Absent:
    """A figure without data."""

    title: str
    reason: str
    remedy: str
    """What to run or set to have it the next time."""
