"""Tables as text: plain for the console, Markdown for a README."""

import re
import textwrap
from collections.abc import Sequence

from clex_train.evaluation.report import cells
from clex_train.evaluation.report.table import Curve, Table

CONSOLE_WIDTH = 100
LENGTH_ROW = "length in tokens"
MARKUP = re.compile(r"[\\|*`<>\[\]]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown could read as more than text; an underscore inside a word is none."""
LEGEND = "Bold: the lowest of a column."


def markdown(tables: Sequence[Table]) -> str:
    """GitHub tables, one below the other, each with its caption; a heading each where there are several."""
    blocks = [_markdown(table) for table in tables]
    if len(blocks) > 1:
        blocks = [f"### {_plain(table.title)}\n\n{block}" for table, block in zip(tables, blocks, strict=True)]
    return "\n".join(blocks)


def console(table: Table) -> str:
    """A plain table of at most 100 columns; more lengths than fit go into a second block below."""
    label_width = min(40, max(len(name) for name in (LENGTH_ROW, *(curve.label for curve in table.curves))))
    widths = {n: 2 + max(len(str(n)), *(len(_both(c, n)) for c in table.curves)) for n in table.lengths}
    blocks: list[list[int]] = [[]]
    for n in table.lengths:
        if label_width + sum(widths[m] for m in blocks[-1]) + widths[n] > CONSOLE_WIDTH:
            blocks.append([])
        blocks[-1].append(n)
    return "\n\n".join(
        [textwrap.fill(table.caption, CONSOLE_WIDTH), *(_block(table, block, widths, label_width) for block in blocks)]
    )


def _markdown(table: Table) -> str:
    best = {n: cells.best(table, n) for n in table.lengths}
    lines = [["", *(_head(table, n) for n in table.lengths)], ["---", *["---:"] * len(table.lengths)]]
    for index, curve in enumerate(table.curves):
        row = [_plain(curve.label)]
        for n in table.lengths:
            value, spread = cells.cell(curve, n), cells.spread(curve.scores.get(n))
            row.append(f"{f'**{value}**' if index in best[n] else value} {spread}".strip())
        lines.append(row)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{table.caption}.{f' {LEGEND}' if any(best.values()) else ''}\n"


def _both(curve: Curve, length: int) -> str:
    """A number and its standard error."""
    return f"{cells.cell(curve, length)} {cells.spread(curve.scores.get(length))}".strip()


def _head(table: Table, length: int) -> str:
    multiple = cells.multiple(length, table)
    return f"{multiple} ({length})" if multiple else str(length)


def _plain(label: str) -> str:
    """A label that cannot end its cell or its line, nor be read as markup."""
    one_line = " ".join(label.split())
    return MARKUP.sub(r"\\\g<0>", one_line)


def _block(table: Table, lengths: list[int], widths: dict[int, int], label_width: int) -> str:
    def line(label: str, values: list[str]) -> str:
        clipped = label if len(label) <= label_width else label[: label_width - 1] + "…"
        return clipped.ljust(label_width) + "".join(v.rjust(widths[n]) for v, n in zip(values, lengths, strict=True))

    heads = [line("", [cells.multiple(n, table) for n in lengths])] if table.context_len else []
    rows = [line(curve.label, [_both(curve, n) for n in lengths]) for curve in table.curves]
    length_row = line(LENGTH_ROW, [str(n) for n in lengths])
    return "\n".join([*heads, length_row, "-" * len(length_row), *rows])
