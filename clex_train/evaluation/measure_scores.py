"""Scores by teacher forcing, as an evaluation file stores them, and their metrics and tables.

A score is a ratio, sum(sums) / sum(counts) over the prompts, with a standard error by a bootstrap over the documents
that the prompts are made of (over the prompts where the filler is no document). Shapes: `P` prompts at one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clex_train.config.measures import Measure
from clex_train.utils.bootstrap import standard_errors

UNITS = {
    "exact": "percent of prompts whose answer tokens are all the most likely ones",
    "nll": "nats per answer token",
    "gap": "nats per answer token, a wrong answer minus the right one (positive is good)",
    "baseline": "nats per answer token without the first appearance",
    "gain": "nats per answer token, without the first appearance minus with it (positive is good)",
}
"""Quantities and their units."""
SHARES = ("exact",)
"""Quantities that tables show in percent."""


@dataclass(frozen=True)
class MeasureScore:
    """One quantity of a measure, by a method, at a length and a place."""

    measure: str
    quantity: str
    """A key of `UNITS`."""
    method: str
    length: int
    """Tokens of prompt and answer together."""
    place: float
    """Depth of the fact, 0 (start) to 1 (end), or distance between two appearances in tokens."""
    sums: list[float]
    """[P]: for each prompt, the sum over its answer tokens (or 1 for an exact answer)."""
    counts: list[int]
    """[P]: answer tokens of each prompt (or 1)."""
    groups: list[int]
    """[P]: units of the bootstrap: the document of each prompt's filler, or the prompt's number."""
    seed: int
    """Seed of the prompts, which also depend on measure, length and number."""
    standard_error: float | None = None
    """Standard error of the value; None with the reason in the note."""
    standard_error_note: str = ""
    copied_from: str = ""
    """Key of the score that this one equals by definition and was copied from; empty if it was computed."""

    @property
    def value(self) -> float:
        """Mean per answer token, or per prompt."""
        # fsum: the order of the prompts must not change the last digit.
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def key(self) -> str:
        """`<measure>_<quantity>/<method>/<length>`, shared by all places."""
        return f"{self.measure}_{self.quantity}/{self.method}/{self.length}"


def with_error(score: MeasureScore) -> MeasureScore:
    """Add the standard error."""
    errors = standard_errors(score.sums, score.counts, score.groups)
    note = errors.note.replace("windows are from one document", "prompts are made of one document")
    return replace(
        score, standard_error=errors.mean_nll, standard_error_note="" if errors.mean_nll is not None else note
    )


def measure_metrics(scores: Sequence[MeasureScore]) -> dict[str, float]:
    """Map `<measure>_<quantity>/<method>/<length>` to the mean over the prompts of all places."""
    groups = dict[str, list[MeasureScore]]()
    # Pooled, not a mean of means: places may have other numbers of answer tokens.
    for score in scores:
        groups.setdefault(score.key, []).append(score)
    return {
        key: math.fsum(value for row in rows for value in row.sums) / sum(sum(row.counts) for row in rows)
        for key, rows in groups.items()
    }


def to_row(score: MeasureScore) -> dict[str, Any]:
    """Convert to plain JSON, with the value; numbers that are not finite become null."""
    value = score.value
    return {
        **vars(score),
        "value": value if math.isfinite(value) else None,
        "sums": [one if math.isfinite(one) else None for one in score.sums],
    }


def measure_tables(scores: Sequence[MeasureScore]) -> str:
    """Format a table for each measure and quantity: rows by method and place, columns by length."""
    # A set would lose the order in which the measures were asked for.
    kinds = dict.fromkeys((score.measure, score.quantity) for score in scores)
    return "\n\n".join(_table([s for s in scores if (s.measure, s.quantity) == kind]) for kind in kinds)


def _table(scores: Sequence[MeasureScore]) -> str:
    first, lengths = scores[0], sorted({score.length for score in scores})
    cells = {(_name(score), score.length): _cell(score) for score in scores}
    names = list(dict.fromkeys(name for name, _ in cells))
    width = max(map(len, names))
    widths = {n: max(len(str(n)), *(len(cells.get((name, n), "-")) for name in names)) + 2 for n in lengths}
    head = " " * width + "".join(str(n).rjust(widths[n]) for n in lengths)
    rows = [name.ljust(width) + "".join(cells.get((name, n), "-").rjust(widths[n]) for n in lengths) for name in names]
    title = f"{first.measure}: {UNITS[first.quantity]}; {len(first.sums)} prompts a cell, by length in tokens"
    return "\n".join([title, head, "-" * len(head), *rows])


def _name(score: MeasureScore) -> str:
    # Quantities of a repetition are the only ones with a distance, in whole tokens; the others have a depth.
    place = "distance" if score.measure == Measure.repetition.value else "depth"
    return f"{score.method}, {place} {score.place:g}"


def _cell(score: MeasureScore) -> str:
    # A prompt is exact or not, so a share has no meaningful decimals.
    factor, digits = (100, 0) if score.quantity in SHARES else (1, 2)
    error = "" if score.standard_error is None else f" ±{factor * score.standard_error:.{digits}f}"
    return f"{factor * score.value:.{digits}f}{error}"
