"""Evaluations side by side: rows taken from evaluation files, in tables within which every number compares.

    rows = [Row("base", Path("runs/base/evaluation/base.json"), "none"), Row("CLEX", Path(...), "trained")]
    tables = read_tables(rows)

A table holds the rows that scored the same tokens under one protocol. Files that scored other tokens, and protocols
that ask another question of the same tokens, stand in tables of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score
from clex_train.utils.errors import ConfigError

LEARNED = "clex"
"""What a score says of the frequencies that were trained rather than set by a formula."""

TOGETHER = {"windows": "streaming"}
"""Protocols that stand in the table of another: windows of L are what a stream is compared with."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a method's scores in one evaluation file."""

    label: str
    path: Path
    method: str
    protocol: str = "one_shot"


@dataclass(frozen=True)
class Curve:
    """Scores against length of one row, with where they come from."""

    label: str
    method: str
    protocol: str
    context_len: int
    """L of the evaluated model, in tokens."""
    scores: Mapping[int, Score]
    path: Path
    """The evaluation file."""
    origin: Origin
    missing: frozenset[int] = frozenset()
    """Lengths that memory did not hold."""

    @property
    def learned(self) -> bool:
        """Whether the frequencies were trained rather than set by a formula."""
        return any(score.frequencies == LEARNED for score in self.scores.values())

    @property
    def perplexity(self) -> dict[int, float]:
        """Length in tokens -> perplexity."""
        return {length: score.perplexity for length, score in self.scores.items()}


@dataclass(frozen=True)
class Table:
    """Curves over the same scored tokens."""

    curves: list[Curve]
    windows: dict[str, Any]

    @property
    def lengths(self) -> list[int]:
        """Every length that a curve has, ascending."""
        return sorted({length for curve in self.curves for length in curve.scores})

    @property
    def context_len(self) -> int | None:
        """L, where all rows agree on it."""
        known = set(self.context_lens)
        return known.pop() if len(known) == 1 else None

    @property
    def context_lens(self) -> list[int]:
        """Every L among the rows, ascending."""
        return sorted({curve.context_len for curve in self.curves})

    @property
    def protocols(self) -> list[str]:
        """Every protocol among the rows, in their order."""
        return list(dict.fromkeys(curve.protocol for curve in self.curves))

    @property
    def title(self) -> str:
        """Short name: protocol, data and windows."""
        protocol = " and ".join(self.protocols)
        data = Path(str(self.curves[0].origin.data.get("path", "unnamed data"))).name
        count, length = self.windows["count"], self.windows["length"]
        if not self.windows["documents"]:
            return f"{protocol} on {data}, one text of {count * length:,} tokens"
        return f"{protocol} on {data}, {count:,} windows of {length:,} tokens"

    @property
    def caption(self) -> str:
        """What the numbers are, what stands beside them, and what could not be had."""
        errors = any(score.standard_error is not None for curve in self.curves for score in curve.scores.values())
        beside = "; ± one standard error, by a bootstrap over documents" if errors else ""
        lacking = [f"{curve.label} at {length:,}" for curve in self.curves for length in sorted(curve.missing)]
        return self.scored + beside + (f"; out of memory (OOM): {', '.join(lacking)}" if lacking else "")

    @property
    def scored(self) -> str:
        """What the numbers are."""
        scores = [score for curve in self.curves for score in curve.scores.values()]
        counts = {score.protocol: score.num_tokens for score in scores}
        if len(set(counts.values())) == 1:
            what = f"({' and '.join(counts)}) on {scores[0].num_tokens:,} held-out tokens"
        else:
            what = f"on held-out tokens ({', '.join(f'{name}: {count:,}' for name, count in counts.items())})"
        documents = len(set(self.windows["documents"]))
        read = f"{self.windows['count']} windows of {documents} documents" if documents else "documents in one stream"
        return f"Perplexity {what}, the same at every length: {read}"


def read_tables(rows: Sequence[Row]) -> list[Table]:
    """The tables that rows make, in the order in which each first occurs.

    Raises `ValueError` for a file that is missing or lacks the row's method.
    """
    files = {path: results.read(path) for path in dict.fromkeys(row.path for row in rows)}
    groups: dict[tuple[str, str], list[Curve]] = {}
    windows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        result, origin = files[row.path]
        curve = _curve(row, result, origin)
        tokens = next(iter(curve.scores.values())).fingerprint
        key = (tokens, TOGETHER.get(row.protocol, row.protocol))
        groups.setdefault(key, []).append(curve)
        windows.setdefault(key, result.windows)
    return [Table(curves, windows[key]) for key, curves in groups.items()]


def rows_of(path: Path, result: Results, prefix: str = "") -> list[Row]:
    """A row for each method and protocol of an evaluation, labelled by the method, `prefix` before it."""
    pairs = dict.fromkeys((score.method, score.protocol) for score in result.scores)
    return [Row(prefix + _name(method, protocol), path, method, protocol) for method, protocol in pairs]


def from_results(result: Results, origin: Origin) -> Table:
    """One table of a single evaluation, a row for each method and protocol."""
    pairs = dict.fromkeys((score.method, score.protocol) for score in result.scores)
    several = len({protocol for _, protocol in pairs}) > 1
    rows = [Row(f"{method}, {protocol}" if several else method, Path(), method, protocol) for method, protocol in pairs]
    return Table([_curve(row, result, origin) for row in rows], result.windows)


def _name(method: str, protocol: str) -> str:
    """A method's name; where protocols share a table, with the one that joins the other's."""
    return f"{method}, {protocol}" if protocol in TOGETHER else method


def _curve(row: Row, result: Results, origin: Origin) -> Curve:
    scores = {s.length: s for s in result.scores if (s.method, s.protocol) == (row.method, row.protocol)}
    if not scores:
        have = ", ".join(dict.fromkeys(f"{s.method}/{s.protocol}" for s in result.scores)) or "no perplexity at all"
        raise ConfigError(row.path, None, f"holds no {row.method}/{row.protocol}, only {have}; evaluate it first")
    missing = frozenset(m.length for m in result.missing if (m.method, m.protocol) == (row.method, row.protocol))
    return Curve(row.label, row.method, row.protocol, result.context_len, scores, row.path, origin, missing)
