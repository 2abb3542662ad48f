"""How a table's numbers are written, and which of a column is the best."""

import math

from clex_train.evaluation.report.table import Curve, Table
from clex_train.evaluation.results import Score

ABSENT, TOO_LARGE = "-", "OOM"


def perplexity(value: float) -> str:
    """Two decimals below 1000, then none, then a power of ten."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 100_000 else f"{value:.1e}"


def cell(curve: Curve, length: int) -> str:
    """The perplexity of a row at a length; `OOM` where memory did not hold it, a dash where it was not measured."""
    score = curve.scores.get(length)
    if score is None:
        return TOO_LARGE if length in curve.missing else ABSENT
    return perplexity(score.perplexity)


def spread(score: Score | None) -> str:
    """`± standard error` of a perplexity; empty where none is known."""
    return "" if score is None or score.standard_error is None else f"±{perplexity(score.standard_error)}"


def multiple(length: int, table: Table) -> str:
    """The length as a multiple of L; empty where the rows disagree on L."""
    return times(length, table.context_len) if table.context_len else ""


def times(length: int, context_len: int) -> str:
    """`16x`: a length over another."""
    ratio = length / context_len
    return f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:,.0f}x"


def best(table: Table, length: int) -> set[int]:
    """Indices of the rows with the lowest perplexity of a column, as written; none where they are all equal."""
    values = {
        index: score.perplexity
        for index, curve in enumerate(table.curves)
        if (score := curve.scores.get(length)) and math.isfinite(score.perplexity)
    }
    lowest = {index for index in values if perplexity(values[index]) == perplexity(min(values.values()))}
    return lowest if len(lowest) < len(values) else set()
