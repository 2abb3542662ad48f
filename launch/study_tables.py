"""Tables of the study from its record: perplexity, differences, retrieval, by length.

    python -m launch.study_tables benchmarks/results/study_2026-12.json      prints the tables of docs/results.md again
    ... --against 'CLEX, our recipe' --seeds 1                               differences from another row, of some seeds

perplexity = exp(mean nll),  the NLL of a window averaged over the seeds of an arm
errors: one standard error, of the books by a paired bootstrap and of the seeds by their spread, added in quadrature
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clex_train.utils import bootstrap
from clex_train.utils.errors import ConfigError, InputError
from clex_train.utils.files import make_folder, write_atomically
from launch import study_record
from launch.study_record import Entry, Record, Share

PROTOCOLS = ("one_shot", "last_k")
MEASURES = {
    "forced_passkey_exact": "passkey, percent of prompts whose five digits are all the argmax",
    "forced_passkey_gap": "passkey, nats a token from the right key to a wrong one (positive is good)",
    "forced_passkey_noise_exact": "passkey in noise, percent of prompts whose digits are all the argmax",
    "forced_passkey_noise_gap": "passkey in noise, nats a token from the right key to a wrong one (positive is good)",
    "repetition_nll": "a repeated statement, nats a token of its second appearance",
}


@dataclass(frozen=True)
class Line:
    """Row of a table: one method on the weights of one arm, over its seeds."""

    label: str
    nll: dict[int, np.ndarray]
    """Length -> [seeds, windows], summed NLL of each window's scored tokens, in nats."""
    tokens: int
    """Scored tokens of each window."""
    documents: list[int]
    """[windows]: book of each window."""

    @property
    def num_seeds(self) -> int:
        """Number of runs that this row is the mean of."""
        return len(next(iter(self.nll.values())))


def text(record: Record) -> str:
    """Format every table of the record, for judging before choosing."""
    selections = sorted({entry.windows for entry in record.entries}, reverse=True)
    parts = [section(record, windows, protocol) for windows in selections for protocol in PROTOCOLS]
    parts += [retrieval(record, windows, name) for windows in selections for name in MEASURES]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(record: Record, folder: Path) -> str:
    """Write the record and its tables into a folder; return the tables."""
    make_folder(folder)
    study_record.write(record, folder / "study.json")
    # From the file and not from memory, so that the committed record prints the same tables again.
    tables = text(study_record.read(folder / "study.json"))
    write_atomically(folder / "tables.md", tables)
    return tables


def section(record: Record, windows: str, protocol: str) -> str:
    """Format perplexities under a protocol, and the differences from the reference; empty without evaluations."""
    rows = lines(record.entries, windows, protocol)
    if not rows:
        return ""
    title = f"### {protocol}, windows `{windows}`"
    unit = record.context_len
    # Windows of 4 L alone have no tax at L.
    cost = tax(rows, record.tax_against) if all(unit in row.nll for row in rows) else None
    parts = [f"{title}: perplexity", table(rows, perplexity_cell, unit, cost)]
    reference = next((row for row in rows if row.label == record.reference), None)
    if reference is not None:
        parts += [f"{title}: percent above `{record.reference}`", table(rows, against(reference), unit)]
    return "\n\n".join(parts)


def retrieval(record: Record, windows: str, name: str) -> str:
    """Format a measure of retrieval by length, the mean over the seeds and places; empty if nobody measured it."""
    entries = [entry for entry in record.entries if entry.windows == windows and name in entry.measures]
    if not entries:
        return ""
    lengths = sorted({length for entry in entries for length in entry.measures[name]})
    unit = "prompts" if name.endswith("_exact") else "tokens"
    head, rows = _head(lengths, record.context_len, [unit]), []
    for label in dict.fromkeys(entry.label for entry in entries):
        own = [entry.measures[name] for entry in entries if entry.label == label]
        cells = [_share(name, [each[n] for each in own if n in each]) for n in lengths]
        count = sum(each[lengths[0]].count for each in own if lengths[0] in each)
        rows.append([label, *cells, str(count)])
    return f"### {MEASURES[name]}, windows `{windows}`\n\n{_markdown(head, rows)}"


def lines(entries: Sequence[Entry], windows: str, protocol: str) -> list[Line]:
    """Build a row for every label that was evaluated, over its seeds."""
    found = [entry for entry in entries if entry.windows == windows and protocol in entry.nll]
    rows = []
    for label in dict.fromkeys(entry.label for entry in found):
        own = [entry for entry in found if entry.label == label]
        lengths = sorted(set.intersection(*(set(entry.nll[protocol]) for entry in own)))
        nll = {n: np.array([entry.nll[protocol][n] for entry in own]) for n in lengths}
        rows.append(Line(label, nll, own[0].tokens[protocol], own[0].documents))
    return rows


def table(
    rows: Sequence[Line], cell: Callable[[Line, int], str], unit: int, last: Callable[[Line], str] | None = None
) -> str:
    """Format a Markdown table: a row per line, a column per length in units of L, and the column `last` if given."""
    lengths = sorted({length for row in rows for length in row.nll})
    head = _head(lengths, unit, [*(["tax at 1x, %"] if last else []), "seeds"])
    body = [
        [row.label, *(cell(row, n) for n in lengths), *([last(row)] if last else []), str(row.num_seeds)]
        for row in rows
    ]
    return _markdown(head, body)


def perplexity_cell(row: Line, length: int) -> str:
    """Format a perplexity."""
    return f"{perplexity(row, length):.2f}"


def perplexity(row: Line, length: int) -> float:
    """Return the perplexity of the mean NLL over the seeds."""
    return float(np.exp(row.nll[length].mean(axis=0).sum() / _num_tokens(row)))


def tax(rows: Sequence[Line], tax_against: str) -> Callable[[Line], str]:
    """Return a function that formats the cost at the shortest length against the base trained on."""
    reference = next((row for row in rows if row.label == tax_against), None)
    if reference is None:
        return lambda row: "-"
    cell = against(reference)
    return lambda row: cell(row, min(row.nll))


def against(reference: Line) -> Callable[[Line, int], str]:
    """Return a function that formats how far a row lies above `reference`, in percent, with one standard error."""

    def cell(row: Line, length: int) -> str:
        if row.label == reference.label:
            return "0"
        value, error = percent(row, reference, length)
        return f"{value:+.1f} ± {error:.1f}"

    return cell


def percent(row: Line, reference: Line, length: int) -> tuple[float, float]:
    """Return how far a row's perplexity lies above `reference`, in percent, and one standard error."""
    mean, error = difference(row, reference, length)
    # A difference of mean NLL is a ratio of perplexities; the delta method carries the error over.
    return 100 * float(np.expm1(mean)), 100 * float(np.exp(mean)) * error


def difference(row: Line, reference: Line, length: int) -> tuple[float, float]:
    """Return the difference of two rows' mean NLL in nats a token, and its standard error over books and seeds."""
    own, other = row.nll[length], reference.nll[length]
    tokens = [row.tokens] * len(row.documents)
    mean, of_books, _ = bootstrap.paired_difference(
        own.mean(axis=0).tolist(), other.mean(axis=0).tolist(), tokens, row.documents
    )
    # Seeds of the two rows are other runs, so their spreads are independent.
    spreads = [_spread(side.sum(axis=1) / _num_tokens(row)) for side in (own, other)]
    return mean, float(np.sqrt(sum(each**2 for each in (*spreads, of_books or 0.0))))


def _spread(means: np.ndarray) -> float:
    """Return the standard error of a mean over seeds; 0 for a single one."""
    return float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0


def _num_tokens(row: Line) -> int:
    return row.tokens * len(row.documents)


def _share(name: str, shares: Sequence[Share]) -> str:
    if not shares:
        return "-"
    value = sum(each.total for each in shares) / sum(each.count for each in shares)
    return f"{100 * value:.0f}" if name.endswith("_exact") else f"{value:.2f}"


def _head(lengths: Iterable[int], unit: int, more: list[str]) -> list[str]:
    return ["", *(f"{length / unit:g}x ({length})" for length in lengths), *more]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def chosen(record: Record, against: str | None, seeds: Sequence[int] | None) -> Record:
    """Return the record with another reference, or some seeds alone; `ConfigError` for what it has no row of."""
    entries = [entry for entry in record.entries if seeds is None or entry.seed in seeds]
    if not entries:
        raise ConfigError("--seeds", seeds, f"the record has {sorted({each.seed for each in record.entries})}")
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if against is not None and against not in labels:
        raise ConfigError("--against", against, f"no row; the record has {'; '.join(labels)}")
    return replace(record, reference=against or record.reference, entries=entries)


def main() -> int:
    """Print the tables of a record; return 2 for a file that is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON file that `python -m launch.study` wrote")
    parser.add_argument("--against", metavar="LABEL", help="count the differences from this row")
    parser.add_argument("--seeds", type=int, nargs="+", help="read these seeds alone, to compare readings of one run")
    args = parser.parse_args()
    try:
        sys.stdout.write(text(chosen(study_record.read(args.record), args.against, args.seeds)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
