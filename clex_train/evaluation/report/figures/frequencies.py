"""Learned frequencies theta_j(t) / theta_j(1) against the pair j, beside the formulas, at some scale factors t.

1 is plain RoPE, 1 / t position interpolation; pair 0 is the fastest. One figure for all runs that start from the same
frequencies, a panel for each t.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from clex_train.evaluation.report.evidence import Evidence, TrainingRun
from clex_train.evaluation.report.figures import canvas as page
from clex_train.evaluation.report.figures.canvas import Canvas, Line
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import of_training
from clex_train.scaling.baselines import ntk_table, pi_table
from clex_train.scaling.table import FrequencyTable, as_grid
from clex_train.tracking.run_folder import FINAL

MOST_PANELS = 3

Formula = Callable[[Tensor, list[float]], FrequencyTable]


def figures(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Two figures for each set of base frequencies that runs with a learned table start from."""
    groups = _same_base([run for run in evidence.runs if run.frequencies is not None])
    if not groups:
        yield Absent(
            "Learned frequencies theta(t)",
            "no run learned its frequencies",
            "train with scaling=clex: deepspeed train.py +experiment=tiny_clex",
        )
    for index, group in enumerate(groups):
        suffix = f"_{index + 1}" if index else ""
        tables = {run.label: run.frequencies for run in group if run.frequencies is not None}
        sources = tuple(map(of_training, group))
        beside, lacking = formulas(group[0])
        yield Figure(
            f"frequencies{suffix}",
            "Learned frequencies theta(t)",
            "theta_j(t) / theta_j(1) of the pair j, against the formulas from the same theta(1): 1 is plain RoPE, 1/t "
            f"position interpolation. Thick: learned.{lacking}",
            sources,
            partial(_panels, partial(_beside_formulas, tables, beside), tables, "theta(t) / theta(1)"),
        )
        yield Figure(
            f"frequencies_learned{suffix}",
            "What was learned: theta(t) over NTK",
            "theta_j(t) over that of NTK-aware scaling with alpha = 2t - 1, where CLEX starts: 1 is nothing learned.",
            sources,
            partial(_panels, partial(_over_ntk, tables), tables, "theta(t) / theta_ntk(t)"),
        )


def scale_factors(tables: Iterable[FrequencyTable]) -> list[float]:
    """At most three scale factors above 1 that every table has, up to the last, spread evenly on a logarithmic scale.

    Powers of two where the tables have enough of them.
    """
    common = set.intersection(*(set(table.t.tolist()) for table in tables)) - {1.0}
    if not common:
        return []
    powers = {t for t in common if math.log2(t).is_integer()} | {max(common)}
    choice = powers if len(powers) >= MOST_PANELS else common
    wanted = np.geomspace(1, max(common), MOST_PANELS + 1)[1:]
    return sorted({min(choice, key=lambda t: abs(np.log(t / w))) for w in wanted})


def formulas(run: TrainingRun) -> tuple[dict[str, Formula], str]:
    """What the learned frequencies are drawn beside, by name; and what is missing there and why, empty if nothing is.

    YaRN's are transformers' own, which needs the model's config: one that has other than plain RoPE has no YaRN.
    """
    known: dict[str, Formula] = {"ntk": ntk_table, "pi": pi_table}
    try:
        return {**known, "yarn": _yarn(run)}, ""
    except ValueError as error:
        return known, f" Without yarn: {error}."


def _yarn(run: TrainingRun) -> Formula:
    """YaRN for the model in a run's `final/`; `ValueError` for one that cannot have it."""
    # transformers takes seconds to import: only reports that draw frequencies pay for it.
    from clex_train.config.evaluation import EvaluationConfig, Method
    from clex_train.config.model import ModelConfig
    from clex_train.evaluation import methods
    from clex_train.models import architecture
    from clex_train.rope.native import native_handle_on_meta

    model = ModelConfig(path=str(run.folder / FINAL))
    config = architecture.to_train(model)
    handle = native_handle_on_meta(config, architecture.context_length(model, config))
    yarn = methods.formulas(EvaluationConfig(), handle)[Method.yarn]
    yarn(handle.base_inv_freq, as_grid([1.0, 2.0]))
    return lambda base, grid: yarn(base, as_grid(grid))


def _beside_formulas(tables: Mapping[str, FrequencyTable], beside: Mapping[str, Formula], t: float) -> list[Line]:
    """theta(t) / theta(1): the learned ones, then the formulas."""
    base = next(iter(tables.values())).at(1).inv_freq
    learned = [(label, table.at(t).inv_freq / table.at(1).inv_freq, True) for label, table in tables.items()]
    others = [(name, formula(base, [1.0, t]).at(t).inv_freq / base, False) for name, formula in beside.items()]
    return [_line(name, ratio, index, bold) for index, (name, ratio, bold) in enumerate([*learned, *others])]


def _over_ntk(tables: Mapping[str, FrequencyTable], t: float) -> list[Line]:
    """theta(t) / theta_ntk(t) of the learned ones."""
    ntk = ntk_table(next(iter(tables.values())).at(1).inv_freq, [1.0, t]).at(t).inv_freq
    return [
        _line(label, table.at(t).inv_freq / ntk, index, True) for index, (label, table) in enumerate(tables.items())
    ]


def _panels(
    lines_at: Callable[[float], list[Line]], tables: Mapping[str, FrequencyTable], name: str, canvas: Canvas
) -> Drawing:
    """A panel for each scale factor, all with the same axis of ratios."""
    factors = scale_factors(tables.values())
    columns = min(canvas.columns, len(factors))
    rows = -(-len(factors) // columns)
    figure = canvas.figure(canvas.height * (0.3 + 0.6 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    drawn = [lines_at(t) for t in factors]
    for axes, t, lines in zip(panels.flatten(), factors, drawn, strict=True):
        _panel(axes, t, lines)
    page.logarithmic_y_if_wide(panels[0, 0], [value for lines in drawn for line in lines for value in line.y], ratio=3)
    for axes in panels[-1]:
        axes.set_xlabel("pair j")
    for axes in panels[:, 0]:
        axes.set_ylabel(name)
    canvas.name_lines(canvas, panels[-1, -1], drawn[-1])
    return figure


def _panel(axes: Axes, t: float, lines: Sequence[Line]) -> None:
    for line in lines:
        page.plot(axes, line)
    axes.set_title(f"t = {t:g}", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    page.tidy(axes)


def _line(label: str, ratio: Tensor, index: int, emphasis: bool) -> Line:
    pairs = np.arange(len(ratio))
    return Line(label, pairs, ratio.cpu().numpy(), page.style(index), emphasis, markers=len(pairs) <= 16)


def _same_base(runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    """Runs grouped by their frequencies at t = 1, to float32."""
    groups: dict[bytes, list[TrainingRun]] = {}
    for run in runs:
        assert run.frequencies is not None, "only runs with a table are grouped"
        base = run.frequencies.at(1).inv_freq.to(torch.float32).cpu().numpy().tobytes()
        groups.setdefault(base, []).append(run)
    return [group for group in groups.values() if scale_factors(run.frequencies for run in group if run.frequencies)]
