"""Evaluations of a run for the back ends: rows of a table, and curves of each measure over length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["step", "measure", "method", "protocol", "length", "value"]
"""Columns of an evaluation's table; the protocol of retrieval tasks is empty."""

Curves = dict[str, list[tuple[int, float]]]
"""Points (length in tokens, value), ascending, by line: the method, and the protocol if there is one."""


def is_evaluation(key: str) -> bool:
    """Return True if a key of metrics.jsonl belongs to an evaluation."""
    # Evaluation keys are `measure/method/.../length`; step metrics have no slash.
    return key.count("/") >= 2


def evaluation_rows(step: int, results: dict[str, float]) -> list[list[Any]]:
    """Make a row of `COLUMNS` for each evaluation key. Values that are not finite are left out."""
    rows: list[list[Any]] = []
    for key, value in results.items():
        measure, method, *protocol, length = key.split("/")
        if math.isfinite(value):
            rows.append([step, measure, method, "".join(protocol), int(length), value])
    return rows


def curves(rows: list[list[Any]]) -> dict[str, Curves]:
    """Collect the rows of one evaluation into curves over length, by measure."""
    found: dict[str, Curves] = {}
    for _, measure, method, protocol, length, value in rows:
        line = f"{method}, {protocol}" if protocol else method
        found.setdefault(measure, {}).setdefault(line, []).append((length, value))
    return {measure: {line: sorted(points) for line, points in lines.items()} for measure, lines in found.items()}


def drawn(measure: str, lines: Curves) -> Figure:
    """Draw the curves of a measure over the length in tokens, for back ends without line plots of their own."""
    # Imported with the first evaluation: the start of a run need not wait for it.
    from matplotlib.figure import Figure

    # `Figure` instead of pyplot, which would keep every figure of a run in memory.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    # Lengths are multiples of L by powers of 2, which a linear axis would crowd at its left end.
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length in tokens", ylabel=measure, title=measure)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
