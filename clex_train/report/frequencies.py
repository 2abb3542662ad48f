"""Draw learned frequencies theta_j(t) / theta_j(1) by pair j, with those of the formulas, at some scale factors t.

1 is plain RoPE, 1/t position interpolation; pair 0 is the fastest. Runs that start from the same frequencies share a
figure with a panel for each t.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from clex_train.report import plotting
from clex_train.report.evidence import Evidence, TrainingRun, training_source
from clex_train.report.plotting import Absent, Figure, Line
from clex_train.scaling.frequency_table import FrequencyTable
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table
from clex_train.scaling.methods.yarn import Yarn
from clex_train.tracking.saved_config import FINAL
from clex_train.utils.errors import InputError

MAX_PANELS = 3

Formula = Callable[[Tensor, list[float]], FrequencyTable]


def figures(evidence: Evidence) -> Iterator[Figure | Absent]:
    """Yield two figures for each set of base frequencies that runs with a learned table start from."""
    groups = _group_by_base([run for run in evidence.runs if run.frequencies is not None])
    if not groups:
        remedy = "train with scaling=clex: deepspeed train.py +experiment=tiny_clex"
        yield Absent("Learned frequencies theta(t)", "no run learned its frequencies", remedy)
    for index, group in enumerate(groups):
        suffix = f"_{index + 1}" if index else ""
        tables = {run.label: run.frequencies for run in group if run.frequencies is not None}
        sources = tuple(map(training_source, group))
        known, lacking = formulas(group[0])
        caption = (
            "theta_j(t) / theta_j(1) of the pair j, against the formulas from the same theta(1): 1 is plain RoPE, 1/t "
            f"position interpolation. Thick: learned.{lacking}"
        )
        draw = partial(_draw_panels, partial(_ratios, tables, known), tables, "theta(t) / theta(1)")
        yield Figure(f"frequencies{suffix}", "Learned frequencies theta(t)", caption, sources, draw)
        caption = "theta_j(t) over that of NTK-aware scaling, alpha = 2t - 1, where CLEX starts: 1 is nothing learned."
        draw = partial(_draw_panels, partial(_ratios_to_ntk, tables), tables, "theta(t) / theta_ntk(t)")
        yield Figure(f"frequencies_learned{suffix}", "Learned theta(t) over NTK", caption, sources, draw)


def scale_factors(tables: Iterable[FrequencyTable]) -> list[float]:
    """Choose at most three scale factors above 1 that every table has, up to the last, evenly on a logarithmic scale.

    Powers of two where the tables have enough of them.
    """
    common = set.intersection(*(set(table.t.tolist()) for table in tables)) - {1.0}
    if not common:
        return []
    powers = {t for t in common if math.log2(t).is_integer()} | {max(common)}
    choice = powers if len(powers) >= MAX_PANELS else common
    wanted = np.geomspace(1, max(common), MAX_PANELS + 1)[1:]
    return sorted({min(choice, key=lambda t: abs(np.log(t / w))) for w in wanted})


def formulas(run: TrainingRun) -> tuple[dict[str, Formula], str]:
    """Return formulas to compare with, by name, and a sentence that says which one is missing and why, or "".

    YaRN's come from transformers, which needs the model's config: one with another RoPE than plain has no YaRN.
    """
    known: dict[str, Formula] = {"ntk": ntk_table, "pi": pi_table}
    try:
        return {**known, "yarn": _yarn(run)}, ""
    except InputError as error:
        return known, f" Without yarn: {error}."


def _yarn(run: TrainingRun) -> Formula:
    """Build YaRN for the model in a run's `final/`; raises `ConfigError` for one that cannot have it."""
    # transformers takes seconds to import: only reports that draw frequencies pay for it.
    from clex_train.config.model import ModelConfig
    from clex_train.models import architecture
    from clex_train.rope.hf_scalings import base_rope
    from clex_train.rope.native import native_handle_on_meta

    model = ModelConfig(path=str(run.folder / FINAL))
    config = architecture.to_train(model)
    handle = native_handle_on_meta(config, architecture.context_length(model, config))
    rope, yarn = base_rope(handle), Yarn()
    # A model that cannot have YaRN is refused here, before anything is drawn.
    yarn.table(rope, [1.0, 2.0])
    return lambda _, grid: yarn.table(rope, grid)


def _ratios(tables: Mapping[str, FrequencyTable], known: Mapping[str, Formula], t: float) -> list[Line]:
    """Return theta(t) / theta(1), the learned ones first."""
    base = next(iter(tables.values())).at(1).inv_freq
    learned = [_line(label, table.at(t).inv_freq / table.at(1).inv_freq, True) for label, table in tables.items()]
    others = [_line(name, formula(base, [1.0, t]).at(t).inv_freq / base, False) for name, formula in known.items()]
    return [*learned, *others]


def _ratios_to_ntk(tables: Mapping[str, FrequencyTable], t: float) -> list[Line]:
    """Return theta(t) / theta_ntk(t) of the learned ones."""
    ntk = ntk_table(next(iter(tables.values())).at(1).inv_freq, [1.0, t]).at(t).inv_freq
    return [_line(label, table.at(t).inv_freq / ntk, True) for label, table in tables.items()]


def _line(label: str, ratio: Tensor, learned: bool) -> Line:
    return Line(label, np.arange(len(ratio)), ratio.cpu().numpy(), learned, markers=len(ratio) <= 16)


def _draw_panels(lines_at: Callable[[float], list[Line]], tables: Mapping[str, FrequencyTable], axis: str) -> Drawing:
    """Draw a panel for each scale factor, one above the other with the same axis of ratios."""
    factors = scale_factors(tables.values())
    figure, panels = plotting.new_figure(len(factors), height=0.6 + 2 * len(factors))
    drawn = [lines_at(t) for t in factors]
    for axes, t, lines in zip(panels[:, 0], factors, drawn, strict=True):
        plotting.draw_lines(axes, lines)
        axes.set_title(f"t = {t:g}", loc="left")
        axes.set_ylabel(axis)
    values = [value for lines in drawn for line in lines for value in line.y]
    plotting.set_logarithmic_if_wide(panels[0, 0], values, ratio=3)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    panels[-1, 0].set_xlabel("pair j")
    return figure


def _group_by_base(runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    """Group runs by their frequencies at t = 1, rounded to float32."""
    groups: dict[bytes, list[TrainingRun]] = {}
    for run in runs:
        assert run.frequencies is not None, "only runs with a table are grouped"
        base = run.frequencies.at(1).inv_freq.to(torch.float32).cpu().numpy().tobytes()
        groups.setdefault(base, []).append(run)
    return [group for group in groups.values() if scale_factors(run.frequencies for run in group if run.frequencies)]
