"""All figures of a report, in the order in which they are shown, and how each becomes a file."""

import io
import re
from collections.abc import Callable, Iterator

from clex_train.evaluation.report.evidence import Evidence
from clex_train.evaluation.report.figures import frequencies, per_position, perplexity, retrieval, training
from clex_train.evaluation.report.figures.canvas import NARROW, WIDE, Canvas, drawing, plain
from clex_train.evaluation.report.figures.figure import Absent, Figure

FIGURES: tuple[Callable[[Evidence], Iterator[Figure | Absent]], ...] = (
    perplexity.figures,
    per_position.figures,
    retrieval.figures,
    frequencies.figures,
    training.loss,
    training.scale_factor,
    training.throughput,
)
LONGEST_TITLE = 90
PAGES = {"wide": WIDE, "narrow": NARROW}


def figures(evidence: Evidence) -> tuple[list[Figure], list[Absent]]:
    """The figures that the evidence allows, and the others with what they lack."""
    every = [found for make in FIGURES for found in make(evidence)]
    return [f for f in every if isinstance(f, Figure)], [f for f in every if isinstance(f, Absent)]


def png(figure: Figure) -> bytes:
    """The figure on white, with its title above: it will be seen without the page."""
    buffer = io.BytesIO()
    with drawing(WIDE, figure.name):
        drawn = figure.draw(WIDE)
        drawn.suptitle(plain(figure.title, LONGEST_TITLE), x=0.01, ha="left", fontsize=13)
        drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Figure, size: str) -> str:
    """The figure as an element that stands inside a page: transparent, its text text, no reference to anywhere."""
    canvas: Canvas = PAGES[size]
    buffer = io.StringIO()
    with drawing(canvas, f"{figure.name} {size}"):
        figure.draw(canvas).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    return text.strip()
