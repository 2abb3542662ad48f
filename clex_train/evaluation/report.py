"""One table and one figure out of several evaluation files: Markdown, JSON, PNG, and a table for the console.

    rows = [Row("base", Path("runs/base/evaluation/final.json"), "none"), Row("CLEX", Path(...), "trained")]
    print(write_report(rows, Path("runs/report")))

All rows must have scored the same tokens: files that did not are refused, because their numbers do not compare.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results
from clex_train.scaling.baselines import TABLES

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7B61B5")
MARKERS = "osD^vPX*"
GREY = "#555555"
CONSOLE_WIDTH = 100
LENGTH_ROW = "length in tokens"


@dataclass(frozen=True)
class Row:
    """One line of the table: a method's scores in one evaluation file."""

    label: str
    path: Path
    method: str
    protocol: str = "one_shot"


@dataclass(frozen=True)
class Curve:
    """Perplexity against length of one row, with where it comes from."""

    label: str
    method: str
    protocol: str
    learned: bool
    """Whether the frequencies were trained rather than set by a formula."""
    perplexity: dict[int, float]
    origin: Origin
    num_tokens: int = 0
    """Scored tokens, equally many at every length."""
    standard_error: dict[int, float | None] = field(default_factory=dict)
    """Of the perplexity, by a bootstrap over documents."""


@dataclass(frozen=True)
class Table:
    """Curves over the same scored tokens."""

    curves: list[Curve]
    context_len: int
    windows: dict[str, Any]
    num_tokens: int

    @property
    def lengths(self) -> list[int]:
        """Every length that a curve has, ascending."""
        return sorted({length for curve in self.curves for length in curve.perplexity})

    @property
    def caption(self) -> str:
        """What the numbers are."""
        counts = {curve.protocol: curve.num_tokens or self.num_tokens for curve in self.curves}
        if len(set(counts.values())) == 1:
            what = f"({' and '.join(counts)}) on {self.num_tokens:,} held-out tokens"
        else:
            what = f"on held-out tokens ({', '.join(f'{name}: {count:,}' for name, count in counts.items())})"
        documents = len(set(self.windows["documents"]))
        read = f"{self.windows['count']} windows of {documents} documents" if documents else "documents in one stream"
        errors = any(error is not None for curve in self.curves for error in curve.standard_error.values())
        note = "; ± one standard error, by a bootstrap over documents" if errors else ""
        return f"Perplexity {what}, the same at every length: {read}{note}"


def write_report(rows: Sequence[Row], folder: Path, name: str = "perplexity") -> str:
    """Write `<name>.json`, `<name>.md` and `<name>.png` into `folder`; return the table for the console.

    Raises `ValueError` for a file that is missing, lacks the row's method, or scored other tokens than the first.
    """
    table = read_table(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(as_json(table), indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(table), encoding="utf-8")
    plot(table, folder / f"{name}.png")
    return console(table)


def read_table(rows: Sequence[Row]) -> Table:
    """Collect the rows' curves from their files."""
    files = {row.path: results.read(row.path) for row in rows}
    first, _ = files[rows[0].path]
    protocols = {row.protocol for row in rows}
    results.require_same_tokens({str(path): result for path, (result, _) in files.items()}, protocols)
    curves = [_curve(row, *files[row.path]) for row in rows]
    return Table(curves, first.context_len, first.windows, curves[0].num_tokens)


def from_results(result: Results, origin: Origin) -> Table:
    """The table of a single evaluation, a row for each method and protocol."""
    pairs = dict.fromkeys((score.method, score.protocol) for score in result.scores)
    several = len({protocol for _, protocol in pairs}) > 1
    rows = [Row(f"{method}, {protocol}" if several else method, Path(), method, protocol) for method, protocol in pairs]
    curves = [_curve(row, result, origin) for row in rows]
    return Table(curves, result.context_len, result.windows, result.scores[0].num_tokens)


def as_json(table: Table) -> dict[str, Any]:
    """The table with the command, the weights and the data behind every row."""
    return {
        "caption": table.caption,
        "context_len": table.context_len,
        "lengths": table.lengths,
        "windows": table.windows,
        "rows": [
            {
                "label": curve.label,
                "method": curve.method,
                "protocol": curve.protocol,
                "num_tokens": curve.num_tokens,
                "perplexity": {n: p if math.isfinite(p) else None for n, p in curve.perplexity.items()},
                "standard_error": curve.standard_error,
                "origin": vars(curve.origin),
            }
            for curve in table.curves
        ],
    }


def markdown(table: Table) -> str:
    """A GitHub table: one row a method, one column a length."""
    head = ["", *(f"{_multiple(n, table.context_len)} ({n})" for n in table.lengths)]
    lines = [head, ["---", *["---:"] * len(table.lengths)]]
    lines += [[curve.label, *(_cell(curve, n) for n in table.lengths)] for curve in table.curves]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{table.caption}.\n"


def console(table: Table) -> str:
    """A plain table of at most 100 columns; more lengths than fit go into a second block below."""
    label_width = min(40, max(len(name) for name in (LENGTH_ROW, *(curve.label for curve in table.curves))))
    widths = {n: 2 + max(len(str(n)), *(len(_cell(curve, n)) for curve in table.curves)) for n in table.lengths}
    blocks: list[list[int]] = [[]]
    for n in table.lengths:
        if label_width + sum(widths[m] for m in blocks[-1]) + widths[n] > CONSOLE_WIDTH:
            blocks.append([])
        blocks[-1].append(n)
    return "\n\n".join(
        [textwrap.fill(table.caption, CONSOLE_WIDTH), *(_block(table, block, widths, label_width) for block in blocks)]
    )


def plot(table: Table, path: Path) -> None:
    """Perplexity against length as a PNG: log2 length, one line a row named at its end, the training length marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=150, layout="constrained")
    for curve, color, marker in zip(table.curves, cycle(COLORS), cycle(MARKERS), strict=False):
        _draw(axes, curve, color, marker)
    _mark_training_length(axes, table.context_len)
    _scale_axes(axes, table)
    axes.set_title("Perplexity of held-out text against context length", loc="left", fontsize=13, pad=22)
    axes.text(0, 1.02, table.caption, transform=axes.transAxes, fontsize=8.5, color=GREY)
    figure.canvas.draw()
    _name_lines(axes, table)
    figure.savefig(path)
    plt.close(figure)


def _curve(row: Row, result: Results, origin: Origin) -> Curve:
    scores = [score for score in result.scores if (score.method, score.protocol) == (row.method, row.protocol)]
    if not scores:
        have = ", ".join(dict.fromkeys(f"{s.method}/{s.protocol}" for s in result.scores))
        raise ValueError(f"{row.path}: holds no {row.method}/{row.protocol}, only {have}; evaluate it first")
    learned = scores[0].frequencies not in TABLES
    return Curve(
        row.label,
        row.method,
        row.protocol,
        learned,
        {s.length: s.perplexity for s in scores},
        origin,
        scores[0].num_tokens,
        {s.length: s.standard_error for s in scores},
    )


def _block(table: Table, lengths: list[int], widths: dict[int, int], label_width: int) -> str:
    def line(label: str, cells: list[str]) -> str:
        clipped = label if len(label) <= label_width else label[: label_width - 1] + "…"
        return clipped.ljust(label_width) + "".join(c.rjust(widths[n]) for c, n in zip(cells, lengths, strict=True))

    head = line("", [_multiple(n, table.context_len) for n in lengths])
    rows = [line(curve.label, [_cell(curve, n) for n in lengths]) for curve in table.curves]
    return "\n".join([head, line(LENGTH_ROW, [str(n) for n in lengths]), "-" * len(head), *rows])


def _multiple(length: int, context_len: int) -> str:
    return f"{length / context_len:.3g}x"


def _cell(curve: Curve, length: int) -> str:
    value = curve.perplexity.get(length)
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    error = curve.standard_error.get(length)
    return _number(value) if error is None else f"{_number(value)} ±{_number(error)}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 100_000 else f"{value:.1e}"


def _points(curve: Curve) -> list[tuple[int, float]]:
    return [(n, p) for n, p in sorted(curve.perplexity.items()) if math.isfinite(p)]


def _draw(axes: Any, curve: Curve, color: str, marker: str) -> None:
    lengths, values = [n for n, _ in _points(curve)], [p for _, p in _points(curve)]
    width, layer = (2.8, 3) if curve.learned else (1.6, 2)
    axes.plot(lengths, values, color=color, marker=marker, markersize=6, linewidth=width, zorder=layer)


def _name_lines(axes: Any, table: Table) -> None:
    """Write each row's name beside its last point, moved apart where two would touch."""
    ends = [(_points(c)[-1], c, color) for c, color in zip(table.curves, cycle(COLORS), strict=False) if _points(c)]
    # In display coordinates, so that the distance holds on a linear and on a logarithmic axis.
    ends.sort(key=lambda end: end[0][1])
    line_height, floor = 0.055 * axes.bbox.height, -math.inf
    for (length, value), curve, color in ends:
        x, y = axes.transData.transform((length, value))
        floor = max(y, floor + line_height)
        axes.annotate(
            curve.label,
            axes.transData.inverted().transform((x, floor)),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=color,
            fontweight="bold" if curve.learned else "normal",
            annotation_clip=False,
        )


def _mark_training_length(axes: Any, context_len: int) -> None:
    axes.axvline(context_len, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.annotate(
        f"trained at {context_len:,}",
        (context_len, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -4),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=GREY,
    )


def _scale_axes(axes: Any, table: Table) -> None:
    from matplotlib import ticker

    values = [p for curve in table.curves for p in curve.perplexity.values() if math.isfinite(p)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(table.lengths, [f"{n:,}\n{_multiple(n, table.context_len)}" for n in table.lengths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("context length (tokens, and as a multiple of the training length)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
