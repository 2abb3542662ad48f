"""The report as one HTML page: tables, figures, and the source of every number. No script, nothing from elsewhere.

Each figure stands in the page twice, for wide and for narrow screens, and the style shows one; colours are variables,
so that the page follows the reader's light or dark scheme and prints light.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import chain

import numpy as np

from clex_train.evaluation.report import cells, gallery
from clex_train.evaluation.report.evidence import Evidence, TaskScores, TrainingRun
from clex_train.evaluation.report.figures.canvas import COLORS, GREY, GRID, INK
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import Source, of_evaluation, of_training
from clex_train.evaluation.report.style import CSS
from clex_train.evaluation.report.table import Table

VARIABLES = {INK: "ink", GREY: "grey", GRID: "grid", **{color: f"s{i}" for i, color in enumerate(COLORS)}}


class Sources:
    """Sources by number, in the order in which the page first names them."""

    def __init__(self) -> None:
        self._numbers: dict[Source, int] = {}

    def link(self, source: Source) -> str:
        """A link to the source's entry at the end of the page."""
        number = self._numbers.setdefault(source, len(self._numbers) + 1)
        return f'<a href="#source-{number}" title="{escape(source.title)}">{number}</a>'

    def entries(self) -> Iterator[str]:
        """The entries, by number."""
        for source, number in self._numbers.items():
            facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in source.facts)
            yield f'<li id="source-{number}"><h3>{escape(source.title)}</h3><dl>{facts}</dl></li>'


def page(evidence: Evidence, figures: Sequence[Figure], absent: Sequence[Absent], made_by: str) -> str:
    """The whole page; `made_by` is what wrote it: command, commit, date."""
    sources = Sources()
    title = f"Report: {', '.join(_labels(evidence))}"
    sections = [
        *_perplexity(evidence, sources),
        *_tasks(evidence, sources),
        *_runs(evidence.runs, sources),
        _section("Figures", "".join(_figure(figure, sources) for figure in figures)),
        *_absent(absent),
        _section("Sources", f"<ol class=sources>{''.join(sources.entries())}</ol>"),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{CSS}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1><p class=made>{escape(made_by)}</p></header>\n<main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _labels(evidence: Evidence) -> list[str]:
    """What is reported on: the runs, or the labels of evaluations outside of any."""
    origins = [row.origin for table in evidence.tables for row in table.curves] + [
        task.origin for task in evidence.tasks
    ]
    return [run.label for run in evidence.runs] or list(dict.fromkeys(origin.label for origin in origins))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _perplexity(evidence: Evidence, sources: Sources) -> Iterator[str]:
    for table in evidence.tables:
        yield _section(f"Perplexity: {table.title}", _perplexity_table(table, evidence.runs, sources))


def _perplexity_table(table: Table, runs: Sequence[TrainingRun], sources: Sources) -> str:
    best = {n: cells.best(table, n) for n in table.lengths}
    heads = "".join(f"<th>{n:,}<small>{cells.multiple(n, table)}</small></th>" for n in table.lengths)
    rows = []
    for index, curve in enumerate(table.curves):
        values = "".join(
            f"<td{' class=best' if index in best[n] else ''}>{cells.cell(curve, n)}"
            f"<small>{cells.spread(curve.scores.get(n))}</small></td>"
            for n in table.lengths
        )
        link = sources.link(of_evaluation(curve.path, curve.origin, runs))
        rows.append(f"<tr><th>{escape(curve.label)}</th>{values}<td class=source>{link}</td></tr>")
    note = " The lowest of each column is marked." if any(best.values()) else ""
    return _table(
        f"<tr><th>length in tokens</th>{heads}<th>source</th></tr>", rows, f"{table.caption}.{note} {_scored(table)}"
    )


def _scored(table: Table) -> str:
    """What tells these tokens from those of another table."""
    prints = sorted({score.fingerprint for curve in table.curves for score in curve.scores.values()})
    return f"Fingerprint of the scored tokens: {', '.join(prints)}."


def _tasks(evidence: Evidence, sources: Sources) -> Iterator[str]:
    for task in dict.fromkeys(scores.task for scores in evidence.tasks):
        shown = [scores for scores in evidence.tasks if scores.task == task]
        yield _section(f"Retrieval: {task}", _task_table(shown, evidence.runs, sources))


def _task_table(shown: Sequence[TaskScores], runs: Sequence[TrainingRun], sources: Sources) -> str:
    lengths = sorted({row.length for scores in shown for row in scores.rows})
    rows = []
    for scores in shown:
        values = "".join(f"<td>{_found(scores, n)}</td>" for n in lengths)
        link = sources.link(of_evaluation(scores.path, scores.origin, runs))
        rows.append(f"<tr><th>{escape(scores.label)}</th>{values}<td class=source>{link}</td></tr>")
    heads = "".join(f"<th>{n:,}</th>" for n in lengths)
    caption = "Percent of what was hidden that was found, over all depths; below it the prompts answered in full."
    return _table(f"<tr><th>length in tokens</th>{heads}<th>source</th></tr>", rows, caption)


def _found(scores: TaskScores, length: int) -> str:
    """The mean over depths, weighed by prompts, and how many were answered in full."""
    rows = [row for row in scores.rows if row.length == length]
    total = sum(row.total for row in rows)
    if not total:
        return cells.ABSENT
    mean = sum(row.score * row.total for row in rows) / total
    return f"{100 * mean:.1f}<small>{sum(row.correct for row in rows)} of {total}</small>"


def _runs(runs: Sequence[TrainingRun], sources: Sources) -> Iterator[str]:
    trained = [run for run in runs if run.metrics]
    if not trained:
        return
    rows = [
        f"<tr><th>{escape(run.label)}</th>{''.join(f'<td>{value}</td>' for value in _training_row(run))}"
        f"<td class=source>{sources.link(of_training(run))}</td></tr>"
        for run in trained
    ]
    names = ("steps", "tokens", "loss", "tokens per second", "seconds per step", "memory, GiB")
    heads = "".join(f"<th>{name}</th>" for name in names)
    caption = "Loss: mean of the last 20 recorded steps. Throughput: median of all, every rank together. Memory: peak."
    yield _section("Training", _table(f"<tr><th></th>{heads}<th>source</th></tr>", rows, caption))


def _training_row(run: TrainingRun) -> list[str]:
    last = run.metrics[-1]
    figures = {key: run.column(key)[1] for key in ("loss", "tokens_per_second", "step_seconds", "memory_gib")}
    return [
        f"{last['step']:,}",
        f"{last['tokens']:,}" if "tokens" in last else cells.ABSENT,
        _number(figures["loss"][-20:].mean() if len(figures["loss"]) else None, ".3f"),
        _number(np.median(figures["tokens_per_second"]) if len(figures["tokens_per_second"]) else None, ",.0f"),
        _number(np.median(figures["step_seconds"]) if len(figures["step_seconds"]) else None, ".3g"),
        _number(figures["memory_gib"].max() if len(figures["memory_gib"]) else None, ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return cells.ABSENT if value is None else format(value, form)


def _table(head: str, rows: Sequence[str], caption: str) -> str:
    body = "".join(rows)
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div><p>{escape(caption)}</p>"


def _figure(figure: Figure, sources: Sources) -> str:
    links = " ".join(sources.link(source) for source in figure.sources)
    drawn = "".join(
        f'<div class="{size}" role="img" aria-label="{escape(figure.title)}">{_themed(gallery.svg(figure, size))}</div>'
        for size in gallery.PAGES
    )
    return (
        f'<figure id="{escape(figure.name)}"><h3>{escape(figure.title)}</h3>{drawn}<figcaption>'
        f"{escape(figure.caption)} Source {links}. <code>{escape(figure.name)}.png</code></figcaption></figure>"
    )


def _themed(svg: str) -> str:
    """The drawing with the page's colours in place of its own."""
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _absent(absent: Sequence[Absent]) -> Iterator[str]:
    if absent:
        items = chain.from_iterable(
            (f"<dt>{escape(each.title)}</dt>", f"<dd>{escape(each.reason)}: <code>{escape(each.remedy)}</code></dd>")
            for each in absent
        )
        yield _section("Not shown", f"<dl>{''.join(items)}</dl>")
