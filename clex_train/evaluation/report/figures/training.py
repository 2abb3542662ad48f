"""What training recorded at each step: the loss, the scale factor t, tokens per second and seconds per step."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from clex_train.evaluation.report.evidence import Evidence, TrainingRun
from clex_train.evaluation.report.figures import canvas as page
from clex_train.evaluation.report.figures.canvas import Canvas, Line
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import of_training

MOST_BINS = 160
MOST_DOTS = 600
NO_RUN = "no run folder with metrics.jsonl among what was named"
NAME_ONE = "name the folder of a run that was trained here: python -m clex_train.cli.report runs/NAME"


def loss(evidence: Evidence) -> Iterator[Figure | Absent]:
    """The training loss, every run a line."""
    runs = _with(evidence, "loss")
    if not runs:
        yield Absent("Training loss", NO_RUN, NAME_ONE)
        return
    yield Figure(
        "loss",
        "Training loss",
        "Mean of the steps of each interval; the shade: from the 10th to the 90th percentile.",
        tuple(map(of_training, runs)),
        partial(_panels, runs, (("loss", "loss in nats per token", _banded),)),
    )


def scale_factor(evidence: Evidence) -> Iterator[Figure | Absent]:
    """The scale factor t that each step was trained at."""
    runs = _with(evidence, "t")
    if not runs:
        yield Absent(
            "Scale factor t against step",
            "no run sampled t: it is what CLEX trains over",
            "train with scaling=clex: deepspeed train.py +experiment=tiny_clex",
        )
        return
    thinned = max(len(run.column("t")[0]) for run in runs) > MOST_DOTS
    yield Figure(
        "scale_factor",
        "Scale factor t against step",
        f"The t of every step{f', thinned evenly to {MOST_DOTS} of each run' if thinned else ''}; t spans 1 to t_max.",
        tuple(map(of_training, runs)),
        partial(_panels, runs, (("t", "scale factor t", _dotted),)),
    )


def throughput(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Tokens per second, and the seconds of a step."""
    runs = _with(evidence, "tokens_per_second")
    if not runs:
        yield Absent("Throughput", NO_RUN, NAME_ONE)
        return
    yield Figure(
        "throughput",
        "Throughput",
        "Mean of the steps of each interval, all ranks together; the shade: from the 10th to the 90th percentile.",
        tuple(map(of_training, runs)),
        partial(
            _panels,
            runs,
            (("tokens_per_second", "tokens per second", _banded), ("step_seconds", "seconds per step", _banded)),
        ),
    )


def binned(steps: np.ndarray, values: np.ndarray, most: int = MOST_BINS) -> np.ndarray:
    """[4, b]: last step, mean, 10th and 90th percentile of `values` [n] in `most` intervals of steps at most."""
    parts = [part for part in np.array_split(np.arange(len(steps)), min(most, len(steps))) if len(part)]
    rows = [(steps[p[-1]], values[p].mean(), *np.quantile(values[p], (0.1, 0.9))) for p in parts]
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T


Draw = Callable[[Axes, TrainingRun, str, int], Line]


def _panels(runs: Sequence[TrainingRun], panels: Sequence[tuple[str, str, Draw]], canvas: Canvas) -> Drawing:
    """Panels one below the other over the same steps; (key, name of the axis, how to draw a run) for each."""
    figure = canvas.figure(canvas.height * (0.25 + 0.5 * len(panels)))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    drawn: list[list[Line]] = []
    for axes, (key, name, draw) in zip(all_axes, panels, strict=True):
        lines = [draw(axes, run, key, index) for index, run in enumerate(runs)]
        drawn.append(lines)
        axes.set_ylabel(name)
        page.tidy(axes)
        page.logarithmic_y_if_wide(axes, [value for line in lines for value in line.y], ratio=20)
    page.steps_on_x(all_axes[-1])
    # Below on a wide page too: runs end at different steps, and a name at the right edge would be far from its line.
    page.below(canvas, all_axes[0], drawn[0])
    return figure


def _banded(axes: Axes, run: TrainingRun, key: str, index: int) -> Line:
    steps, mean, low, high = binned(*run.column(key))
    line = Line(run.label, steps, mean, page.style(index), markers=False)
    axes.fill_between(steps, low, high, color=line.style.color, alpha=0.15, linewidth=0)
    page.plot(axes, line)
    return line


def _dotted(axes: Axes, run: TrainingRun, key: str, index: int) -> Line:
    steps, values = run.column(key)
    kept = np.unique(np.linspace(0, len(steps) - 1, min(MOST_DOTS, len(steps))).round().astype(int))
    look = page.style(index)
    axes.plot(steps[kept], values[kept], linestyle="none", marker=look.marker, markersize=2.5, color=look.color)
    return Line(run.label, steps[kept], values[kept], look)


def _with(evidence: Evidence, key: str) -> list[TrainingRun]:
    return [run for run in evidence.runs if len(run.column(key)[0])]
