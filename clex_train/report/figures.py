"""List the figures of a report: perplexity by length, loss by position, retrieval, frequencies, training."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clex_train.evaluation.results import Score
from clex_train.evaluation.tables import TOGETHER, Curve, Table
from clex_train.report import frequencies, plotting
from clex_train.report.evidence import Evidence, Source, TaskScores, TrainingRun, evaluation_source, training_source
from clex_train.report.plotting import COLORS, Absent, Figure, Line

EVALUATE = "python -m clex_train.cli.evaluate run=FOLDER"
MAX_SEGMENTS, MAX_BINS, MAX_DOTS = 128, 160, 600
STREAMS = {*TOGETHER, *TOGETHER.values()}
NO_RUN = "no run folder with metrics.jsonl among the arguments"
NAME_RUN = "name the folder of a run that was trained here: python -m clex_train.cli.report runs/NAME"


def collect_figures(evidence: Evidence) -> tuple[list[Figure], list[Absent]]:
    """Return the figures that have data, and the others with the reason and remedy."""
    every = [found for make in FIGURES for found in make(evidence)]
    return [f for f in every if isinstance(f, Figure)], [f for f in every if isinstance(f, Absent)]


def perplexity(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield a figure for each table, and one of its lowest rows where another row dwarfs them."""
    if not evidence.tables:
        reason = "the evaluations hold retrieval tasks alone"
        yield Absent("Perplexity against length", reason, f"{EVALUATE} protocols=[one_shot]")
    drawn = [table for table in evidence.tables if _has_lengths(table)]
    for index, table in enumerate(drawn or evidence.tables[:1]):
        caption, sources = _perplexity_caption(table), _evaluations(table.curves, evidence)
        name = f"perplexity{_suffix(index)}"
        title = f"Perplexity against length: {table.title}"
        yield Figure(name, title, caption, sources, partial(draw_perplexity, table))
        if (top := lowest_part(table)) is not None:
            title = f"The lowest of them, enlarged: {table.title}"
            yield Figure(f"{name}_enlarged", title, caption, sources, partial(draw_perplexity, table, top))


def _has_lengths(table: Table) -> bool:
    """Return True for tables over lengths, unlike streams and `per_position`, whose figure is the loss by position."""
    by_position = any(score.curve for curve in table.curves for score in curve.scores.values())
    return not by_position and any(len(curve.scores) > 1 for curve in table.curves)


def lowest_part(table: Table) -> float | None:
    """Return the upper limit of the axis that separates the good rows, if another row grows out of proportion.

    It is 1.5 times the best row's largest perplexity; None unless a row goes eight times as high and two stay below.
    """
    lines = [perplexity_line(curve) for curve in table.curves]
    peaks = sorted(max(line.y) for line in lines if len(line.y) == len(table.lengths))
    if len(peaks) < 3:
        return None
    top = 1.5 * peaks[0]
    return float(top) if peaks[-1] > 8 * peaks[0] and peaks[1] < top else None


def draw_perplexity(table: Table, top: float | None = None) -> Drawing:
    """Draw the rows over log2 of the length, up to `top`; panels of at most eight, the other rows faint behind."""
    lines = [perplexity_line(curve) for curve in table.curves]
    lines = [line for line in lines if len(line.y) and (top is None or min(line.y) <= top)]
    figure, panels = plotting.draw_panels(lines)
    for axes in panels:
        axes.set_ylabel("perplexity (lower is better)")
        plotting.mark_training_lengths(axes, table.context_lens)
    plotting.set_length_axis(panels[-1], table.lengths, table.context_len)
    values = [value for line in lines for value in line.y]
    if top is None:
        plotting.set_logarithmic_if_wide(panels[0], values)
    else:
        panels[0].set_ylim(min(values) - 0.04 * (top - min(values)), top)
    return figure


def perplexity_line(curve: Curve) -> Line:
    """Return the finite perplexities of a row in order of length, with errors where any is known."""
    scores = [score for _, score in sorted(curve.scores.items()) if math.isfinite(score.perplexity)]
    errors = [score.standard_error for score in scores]
    known = any(error is not None for error in errors)
    x = np.array([score.length for score in scores], dtype=np.float64)
    y = np.array([score.perplexity for score in scores])
    return Line(curve.label, x, y, curve.learned, np.array([error or 0.0 for error in errors]) if known else None)


def _perplexity_caption(table: Table) -> str:
    parts = [f"{table.caption}."]
    if any(score.standard_error is not None for curve in table.curves for score in curve.scores.values()):
        parts.append("Rows score the same documents, so bars that overlap do not make a difference insignificant.")
    if any(len(perplexity_line(curve).x) < len(curve.scores) for curve in table.curves):
        parts.append("Values that are not finite are left out.")
    if any(curve.learned for curve in table.curves):
        parts.append("Thick: learned frequencies.")
    return " ".join(parts)


def loss_by_position(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield a figure for each table whose rows have a loss by position.

    In a window (Han et al., LM-Infinite, arXiv 2308.16137, figure 4) the evaluation has summed it in bins of positions
    (protocol `per_position`). Along a stream its segments are the bins; the same tokens in windows of L, drawn with it,
    show the text's own share.
    """
    drawn = [table for table in evidence.tables if _position_lines(table)]
    for index, table in enumerate(drawn):
        curves = [curve for curve in table.curves if _points(curve, table.windows) is not None]
        along = "along the stream" if curves[0].protocol in STREAMS else f"in windows of {table.lengths[-1]:,} tokens"
        yield Figure(
            f"per_position{_suffix(index)}",
            f"Loss against position: {table.title}",
            f"Mean negative log-likelihood {along}. {table.scored.partition(' on ')[2]}.",
            _evaluations(curves, evidence),
            partial(draw_loss_by_position, table),
        )
    if not drawn:
        reason = "no evaluation was made position by position"
        yield Absent("Loss against position", reason, f"{EVALUATE} protocols=[per_position]")


def draw_loss_by_position(table: Table) -> Drawing:
    """Draw nats per token over the position in tokens."""
    figure, panels = plotting.draw_panels(_position_lines(table))
    for axes in panels:
        plotting.mark_training_lengths(axes, table.context_lens)
        axes.set_ylabel("nll in nats per token (lower is better)")
    axes = panels[-1]
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 4, 5, 8, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plotting.format_tokens(value)))
    axes.set_xlabel("position of the predicted token")
    return figure


def _position_lines(table: Table) -> list[Line]:
    found = [(curve, _points(curve, table.windows)) for curve in table.curves]
    return [Line(c.label, *xy, learned=c.learned, markers=len(xy[0]) <= 32) for c, xy in found if xy is not None]


def _points(curve: Curve, windows: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return positions and mean nll of a row's longest window or of its stream; None for a row without."""
    score = curve.scores[max(curve.scores)]
    if curve.protocol in STREAMS:
        x, y = _segment_means(score, windows)
    elif score.curve:
        x, y = np.array(score.curve, dtype=np.float64)[:, :2].T
    else:
        return None
    known = np.isfinite(y)
    return x[known], y[known]


def _segment_means(score: Score, windows: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring segments of a stream, which are of equal length; return their middles and means."""
    sums = np.array(score.window_nll)
    scored = score.num_tokens / len(sums)
    parts = np.array_split(np.arange(len(sums)), min(MAX_SEGMENTS, len(sums)))
    middles = [(part[0] + part[-1] + 1) / 2 * windows["length"] for part in parts]
    return np.array(middles), np.array([sums[part].mean() / scored for part in parts])


def retrieval(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield a heat map for each task that has several depths; others are in the report's tables alone."""
    graded = [scores for scores in evidence.tasks if any(row.depth is not None for row in scores.rows)]
    for task in dict.fromkeys(scores.task for scores in graded):
        shown = [scores for scores in graded if scores.task == task]
        totals = sorted({row.total for scores in shown for row in scores.rows})
        prompts = f"{totals[0]}" if len(totals) == 1 else f"{totals[0]} to {totals[-1]}"
        caption = f"Percent of the hidden facts that were found, by depth and length; {prompts} prompts in each cell."
        name = f"retrieval_{re.sub(r'[^A-Za-z0-9]+', '_', task)}"
        sources = _evaluations(shown, evidence)
        yield Figure(name, f"Retrieval: {task}", caption, sources, partial(draw_retrieval, shown))
    if not graded:
        reason = "no retrieval task was evaluated"
        yield Absent("Passkey and needle, depth against length", reason, f"{EVALUATE} tasks=[passkey]")


def draw_retrieval(shown: Sequence[TaskScores]) -> Drawing:
    """Draw a panel of cells for each method, lengths to the right, depths downwards; depth 0 is the text's start."""
    lengths = sorted({row.length for scores in shown for row in scores.rows})
    depths = sorted({row.depth for scores in shown for row in scores.rows if row.depth is not None})
    columns = min(len(shown), 3 if len(lengths) <= 8 else 1)
    rows = math.ceil(len(shown) / columns)
    figure, panels = plotting.new_figure(rows, columns, height=rows * (0.75 + 0.26 * len(depths)) + 0.5)
    for axes, scores in zip(panels.flat, shown, strict=False):
        _draw_cells(axes, retrieval_grid(scores, lengths, depths))
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [plotting.format_tokens(n) for n in lengths])
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
        axes.set_title(plotting.as_text(scores.label), loc="left")
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("length in tokens", fontsize=9)
    figure.supylabel("depth", fontsize=9)
    return figure


def retrieval_grid(scores: TaskScores, lengths: Sequence[int], depths: Sequence[float]) -> np.ndarray:
    """Return scores float64 [depths, lengths] from 0 to 1; NaN where no prompt was given."""
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in scores.rows:
        if row.depth is not None:
            cells[depths.index(row.depth), lengths.index(row.length)] = row.score
    return cells


def _draw_cells(axes: Axes, cells: np.ndarray) -> None:
    # A mesh is drawn as vectors: an image would be embedded as a blurred bitmap. 0.85 keeps the darkest cell blue.
    axes.pcolormesh(cells, cmap="Blues", vmin=0, vmax=1 / 0.85, edgecolors="white", linewidth=1)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            ink = "white" if value > 0.6 else "#1a1a1a"
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_ylim(len(cells), 0)


def loss(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield the training loss by step."""
    caption = "Mean of the steps of each interval; the shade: from the 10th to the 90th percentile."
    return _training("loss", "Training loss", "loss in nats per token", caption, evidence, Absent(
        "Training loss", NO_RUN, NAME_RUN))  # fmt: skip


def throughput(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield tokens per second by step."""
    caption = (
        "Mean of the steps of each interval, all ranks together; the shade: from the 10th to the 90th percentile. "
        "A step takes the global batch size in tokens divided by it."
    )
    return _training("tokens_per_second", "Throughput", "tokens per second", caption, evidence, Absent(
        "Throughput", NO_RUN, NAME_RUN), name="throughput")  # fmt: skip


def scale_factor(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield the scale factor t that each step was trained at."""
    most = max((len(run.column("t")[0]) for run in evidence.runs), default=0)
    thinned = f", thinned evenly to {MAX_DOTS} of each run" if most > MAX_DOTS else ""
    caption = f"The t of every step{thinned}; t spans 1 to t_max."
    remedy = "train with scaling=clex: deepspeed train.py +experiment=tiny_clex"
    title = "Scale factor t against step"
    absent = Absent(title, "no run sampled t, which CLEX trains over", remedy)
    return _training("t", title, "scale factor t", caption, evidence, absent, name="scale_factor")


def _training(
    key: str, title: str, axis: str, caption: str, evidence: Evidence, absent: Absent, name: str = ""
) -> Iterator[Figure | Absent]:
    runs = [run for run in evidence.runs if len(run.column(key)[0])]
    if not runs:
        yield absent
        return
    draw = partial(draw_training, runs, key, axis)
    yield Figure(name or key, title, caption, tuple(map(training_source, runs)), draw)


def draw_training(runs: Sequence[TrainingRun], key: str, axis: str) -> Drawing:
    """Draw a figure of training by optimizer step: t as dots, anything else as means over a band."""
    figure, panels = plotting.new_figure(height=3.2)
    axes = panels[0, 0]
    lines = []
    for index, run in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        steps, values = run.column(key)
        if key == "t":
            kept = np.unique(np.linspace(0, len(steps) - 1, min(MAX_DOTS, len(steps))).round().astype(int))
            steps, values = steps[kept], values[kept]
            axes.plot(steps, values, linestyle="none", marker="o", markersize=2.5, color=color)
        else:
            steps, values, low, high = bin_steps(steps, values)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, values, color=color)
        lines.append(Line(run.label, steps, values, markers=False))
    plotting.add_legend(axes, lines)
    plotting.set_logarithmic_if_wide(axes, [value for line in lines for value in line.y], ratio=20)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(axis)
    return figure


def bin_steps(steps: np.ndarray, values: np.ndarray, most: int = MAX_BINS) -> np.ndarray:
    """Return [4, b]: last step, mean, 10th and 90th percentile of `values` [n] in at most `most` intervals of steps."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    rows = [(steps[p[-1]], values[p].mean(), *np.quantile(values[p], (0.1, 0.9))) for p in parts]
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T


def _evaluations(rows: Sequence[Curve] | Sequence[TaskScores], evidence: Evidence) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(evaluation_source(row.path, row.origin, evidence.runs) for row in rows))


def _suffix(index: int) -> str:
    return f"_{index + 1}" if index else ""


FIGURES: tuple[Callable[[Evidence], Iterator[Figure | Absent]], ...] = (
    perplexity,
    loss_by_position,
    retrieval,
    frequencies.figures,
    loss,
    scale_factor,
    throughput,
)
"""Figures in the order of a report."""
