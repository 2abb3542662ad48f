"""Write the report as one HTML page: tables, figures, and the source of every number, without scripts or downloads.

Colors of the figures become variables of the page, so that they follow the reader's light or dark scheme.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from clex_train.evaluation.tables import ABSENT, Table
from clex_train.report.evidence import Evidence, Source, TaskScores, TrainingRun, evaluation_source, training_source
from clex_train.report.plotting import COLORS, GREY, GRID, INK, Absent, Figure, to_svg

VARIABLES = {INK: "ink", GREY: "grey", GRID: "grid", **{color: f"s{i}" for i, color in enumerate(COLORS)}}


class Sources:
    """Number sources in the order in which the page first names them."""

    def __init__(self) -> None:
        self.numbers: dict[Source, int] = {}

    def number(self, source: Source) -> int:
        """Return the number of a source's entry at the end of the page."""
        return self.numbers.setdefault(source, len(self.numbers) + 1)


def render(evidence: Evidence, figures: Sequence[Figure], absent: Sequence[Absent], made_by: str) -> str:
    """Render the page; `made_by` names the command, the commit and the date that wrote it."""
    return _template().render(
        title=f"Report: {', '.join(_labels(evidence))}",
        made_by=made_by,
        tables=evidence.tables,
        fingerprints=fingerprints,
        tasks={task: _task_rows(evidence, task) for task in dict.fromkeys(s.task for s in evidence.tasks)},
        runs=[(run, training_figures(run), training_source(run)) for run in evidence.runs if run.metrics],
        figures=[(figure, _use_variables(to_svg(figure))) for figure in figures],
        absent=absent,
        sources=Sources(),
        source_of=lambda row: evaluation_source(row.path, row.origin, evidence.runs),
    )


@cache
def _template() -> Template:
    # StrictUndefined: a name that the template misspells is an error, not an empty string.
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html.j2")


def _labels(evidence: Evidence) -> list[str]:
    """Return the labels of the runs, or of the evaluations if they are not in a run."""
    origins = [row.origin for table in evidence.tables for row in table.curves]
    origins += [task.origin for task in evidence.tasks]
    return [run.label for run in evidence.runs] or list(dict.fromkeys(origin.label for origin in origins))


def fingerprints(table: Table) -> str:
    """List the fingerprints of the scored tokens, which distinguish tables of the same shape."""
    return ", ".join(sorted({score.fingerprint for curve in table.curves for score in curve.scores.values()}))


def _task_rows(evidence: Evidence, task: str) -> dict[str, Any]:
    shown = [scores for scores in evidence.tasks if scores.task == task]
    lengths = sorted({row.length for scores in shown for row in scores.rows})
    heads = [f"{n:,}" for n in lengths]
    return {"heads": heads, "rows": [(scores, [found(scores, n) for n in lengths]) for scores in shown]}


def found(scores: TaskScores, length: int) -> tuple[str, str]:
    """Format the mean over depths, weighted by prompts, and the number of prompts answered in full."""
    rows = [row for row in scores.rows if row.length == length]
    total = sum(row.total for row in rows)
    if not total:
        return ABSENT, ""
    mean = sum(row.score * row.total for row in rows) / total
    return f"{100 * mean:.1f}", f"{sum(row.correct for row in rows)} of {total}"


def training_figures(run: TrainingRun) -> dict[str, str]:
    """Format a run's last step and tokens, mean loss of 20 steps, median throughput and peak memory."""
    last = run.metrics[-1]
    loss, speed, seconds, memory = (
        run.column(key)[1] for key in ("loss", "tokens_per_second", "step_seconds", "memory_gib")
    )
    return {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}" if "tokens" in last else ABSENT,
        "loss": f"{loss[-20:].mean():.3f}" if len(loss) else ABSENT,
        "tokens per second": f"{np.median(speed):,.0f}" if len(speed) else ABSENT,
        "seconds per step": f"{np.median(seconds):.3g}" if len(seconds) else ABSENT,
        "memory, GiB": f"{memory.max():.2f}" if len(memory) else ABSENT,
    }


def _use_variables(svg: str) -> str:
    """Replace the drawing's colors by the page's variables."""
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
