"""Put evaluations in tables within which every number compares, and write them for the console and as Markdown.

    rows = [Row("base", Path("runs/base/evaluation/base.json"), "none"), Row("CLEX", Path(...), "trained")]
    print(console(read_tables(rows)[0]))

A table has the rows that scored the same tokens under one protocol. Files that scored other tokens, and protocols that
measure something else on the same tokens, get tables of their own.
"""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score, Tax
from clex_train.utils.errors import ConfigError

LEARNED = "clex"
"""`Score.frequencies` of trained frequencies; those of a formula have its name."""
TOGETHER = {"windows": "streaming"}
"""Protocols that share the table of another: a stream is compared with windows of L."""
ABSENT, TOO_LARGE = "-", "OOM"
CONSOLE_WIDTH = 100
LENGTH_ROW = "length in tokens"
TAX = 0
"""Key of the column of taxes among those of the lengths."""
MARKUP = re.compile(r"[\\|*`<>\[\]]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown reads as markup; an underscore inside a word is none."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a method's scores in one evaluation file."""

    label: str
    path: Path
    method: str
    protocol: str = "one_shot"


@dataclass(frozen=True)
class Curve:
    """The scores of one row by length, and their origin."""

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
    """Lengths that ran out of memory."""
    tax: Tax | None = None
    """Perplexity at the shortest length against the base, where one is named."""

    @property
    def learned(self) -> bool:
        """True if the frequencies were trained rather than set by a formula."""
        return any(score.frequencies == LEARNED for score in self.scores.values())

    @property
    def perplexity(self) -> dict[int, float]:
        """Perplexity by length in tokens."""
        return {length: score.perplexity for length, score in self.scores.items()}

    def cell(self, length: int) -> str:
        """Format the perplexity at a length; `OOM` where memory ran out, a dash where it was not measured."""
        score = self.scores.get(length)
        if score is None:
            return TOO_LARGE if length in self.missing else ABSENT
        return format_perplexity(score.perplexity)

    def error(self, length: int) -> str:
        """Format the standard error at a length as `±0.12`; empty where none is known."""
        score = self.scores.get(length)
        return "" if score is None or score.standard_error is None else f"±{format_perplexity(score.standard_error)}"

    @property
    def tax_cell(self) -> str:
        """Format the tax as `+1.25 ±0.10`, in percent; a dash where no base is named."""
        if self.tax is None or self.tax.percent is None:
            return ABSENT
        error = "" if self.tax.standard_error is None else f" ±{self.tax.standard_error:.2f}"
        return f"{self.tax.percent:+.2f}{error}"


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
        return self.context_lens[0] if len(self.context_lens) == 1 else None

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
        """One sentence on the tokens, the errors, and the cells that ran out of memory."""
        errors = any(score.standard_error is not None for curve in self.curves for score in curve.scores.values())
        bootstrap = "; ± one standard error, by a bootstrap over documents" if errors else ""
        lacking = [f"{curve.label} at {length:,}" for curve in self.curves for length in sorted(curve.missing)]
        bases = dict.fromkeys(curve.tax.baseline for curve in self.curves if curve.tax)
        tax = f"; tax: perplexity above that of {' and '.join(bases)}, paired by document" if bases else ""
        return self.scored + bootstrap + tax + (f"; out of memory (OOM): {', '.join(lacking)}" if lacking else "")

    @property
    def tax_head(self) -> str:
        """Title of the column of taxes, like `tax at 1x, %`; empty where no row has one."""
        lengths = sorted({curve.tax.length for curve in self.curves if curve.tax})
        return f"tax at {' and '.join(self.multiple(n) or str(n) for n in lengths)}, %" if lengths else ""

    @property
    def scored(self) -> str:
        """The scored tokens: how many, of which windows."""
        scores = [score for curve in self.curves for score in curve.scores.values()]
        counts = {score.protocol: score.num_tokens for score in scores}
        if len(set(counts.values())) == 1:
            what = f"({' and '.join(counts)}) on {scores[0].num_tokens:,} held-out tokens"
        else:
            what = f"on held-out tokens ({', '.join(f'{name}: {count:,}' for name, count in counts.items())})"
        documents = len(set(self.windows["documents"]))
        read = f"{self.windows['count']} windows of {documents} documents" if documents else "documents in one stream"
        return f"Perplexity {what}, the same at every length: {read}"

    def multiple(self, length: int) -> str:
        """Format a length as a multiple of L; empty where the rows disagree on L."""
        return times(length, self.context_len) if self.context_len else ""

    def best(self, length: int) -> set[int]:
        """Return the indices of the rows whose perplexity, as written, is lowest; none where all are equal."""
        scores = {i: curve.scores.get(length) for i, curve in enumerate(self.curves)}
        values = {i: score.perplexity for i, score in scores.items() if score and math.isfinite(score.perplexity)}
        lowest = {i for i in values if format_perplexity(values[i]) == format_perplexity(min(values.values()))}
        return lowest if len(lowest) < len(values) else set()


def read_tables(
    rows: Sequence[Row], prepared: Callable[[Results, Origin], Results] = lambda result, origin: result
) -> list[Table]:
    """Read the rows' files and return their tables, in the order in which each first occurs.

    `prepared` completes the results of each file. Raises `ConfigError` for a file that is missing or lacks the row's
    method.
    """
    read = {path: results.read(path) for path in dict.fromkeys(row.path for row in rows)}
    files = {path: (prepared(*file), file[1]) for path, file in read.items()}
    tables: dict[tuple[str, str], Table] = {}
    for row in rows:
        result, origin = files[row.path]
        curve = _curve(row, result, origin)
        tokens = next(iter(curve.scores.values())).fingerprint
        key = (tokens, TOGETHER.get(row.protocol, row.protocol))
        tables.setdefault(key, Table([], result.windows)).curves.append(curve)
    return list(tables.values())


def rows_of(path: Path, result: Results, prefix: str = "") -> list[Row]:
    """Return a row for each method and protocol of an evaluation, labelled `prefix` + method."""
    pairs = dict.fromkeys((score.method, score.protocol) for score in result.scores)
    return [Row(prefix + (f"{m}, {p}" if p in TOGETHER else m), path, m, p) for m, p in pairs]


def from_results(result: Results, origin: Origin) -> Table:
    """Return one table of a single evaluation, with a row for each method and protocol."""
    pairs = dict.fromkeys((score.method, score.protocol) for score in result.scores)
    several = len({protocol for _, protocol in pairs}) > 1
    rows = [Row(f"{m}, {p}" if several else m, Path(), m, p) for m, p in pairs]
    return Table([_curve(row, result, origin) for row in rows], result.windows)


def _curve(row: Row, result: Results, origin: Origin) -> Curve:
    scores = {s.length: s for s in result.scores if (s.method, s.protocol) == (row.method, row.protocol)}
    if not scores:
        have = ", ".join(dict.fromkeys(f"{s.method}/{s.protocol}" for s in result.scores)) or "no perplexity at all"
        raise ConfigError(row.path, None, f"holds no {row.method}/{row.protocol}, only {have}; evaluate it first")
    missing = frozenset(m.length for m in result.missing if (m.method, m.protocol) == (row.method, row.protocol))
    tax = next((tax for tax in result.taxes if (tax.method, tax.protocol) == (row.method, row.protocol)), None)
    return Curve(row.label, row.method, row.protocol, result.context_len, scores, row.path, origin, missing, tax)


def format_perplexity(value: float) -> str:
    """Format with two decimals below 1000, then none, then as a power of ten."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 100_000 else f"{value:.1e}"


def times(length: int, context_len: int) -> str:
    """Format the ratio of two lengths, like `16x`."""
    ratio = length / context_len
    return f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:,.0f}x"


def markdown(tables: Sequence[Table]) -> str:
    """Write GitHub tables one below the other, each with its caption; with headings where there are several."""
    blocks = [_markdown(table) for table in tables]
    if len(blocks) > 1:
        blocks = [f"### {_escape(table.title)}\n\n{block}" for table, block in zip(tables, blocks, strict=True)]
    return "\n".join(blocks)


def _markdown(table: Table) -> str:
    best = {n: table.best(n) for n in table.lengths}
    heads = [f"{table.multiple(n)} ({n})" if table.context_len else str(n) for n in table.lengths]
    heads += [table.tax_head] if table.tax_head else []
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    for index, curve in enumerate(table.curves):
        cells = [f"**{curve.cell(n)}**" if index in best[n] else curve.cell(n) for n in table.lengths]
        errors = [curve.error(n) for n in table.lengths]
        taxes = [curve.tax_cell] if table.tax_head else []
        lines.append([_escape(curve.label), *(f"{c} {e}".strip() for c, e in zip(cells, errors, strict=True)), *taxes])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{table.caption}.{' Bold: the lowest of a column.' if any(best.values()) else ''}\n"


def _escape(label: str) -> str:
    """Return a label that cannot end its cell or its line, nor be read as markup."""
    return MARKUP.sub(r"\\\g<0>", " ".join(label.split()))


def console(table: Table) -> str:
    """Write a plain table of at most 100 columns; lengths that do not fit go into another block below."""
    names = [LENGTH_ROW, *(curve.label for curve in table.curves)]
    label_width = min(40, max(map(len, names)))
    cells = {n: [f"{c.cell(n)} {c.error(n)}".strip() for c in table.curves] for n in table.lengths}
    columns = {n: [table.multiple(n), str(n), *cells[n]] for n in table.lengths}
    if table.tax_head:
        columns[TAX] = ["", table.tax_head, *(curve.tax_cell for curve in table.curves)]
    widths = {n: 2 + max(map(len, columns[n][1:])) for n in columns}
    blocks: list[list[int]] = [[]]
    for n in columns:
        if label_width + sum(widths[m] for m in blocks[-1]) + widths[n] > CONSOLE_WIDTH:
            blocks.append([])
        blocks[-1].append(n)
    labels = [name if len(name) <= label_width else name[: label_width - 1] + "…" for name in ["", *names]]
    written = [_block(labels, {n: columns[n] for n in block}, widths, label_width) for block in blocks]
    return "\n\n".join([textwrap.fill(table.caption, CONSOLE_WIDTH), *written])


def _block(labels: list[str], columns: Mapping[int, list[str]], widths: Mapping[int, int], label_width: int) -> str:
    """Write one block: the multiples of L where they are known, the lengths, a rule, and the rows."""
    lines = [
        label.ljust(label_width) + "".join(column[i].rjust(widths[n]) for n, column in columns.items())
        for i, label in enumerate(labels)
    ]
    heads = lines[:2] if lines[0].strip() else lines[1:2]
    return "\n".join([*heads, "-" * len(lines[1]), *lines[2:]])
