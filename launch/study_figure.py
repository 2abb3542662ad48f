"""The figure of docs/results.md, drawn from the committed record of the study.

    python -m launch.study_figure

Three facets of what was judged: perplexity, the last tokens against YaRN at factor 16 with the errors of paired
differences, and passkeys. The perplexities of two methods have large errors in common, those of the books, so only the
differences have bars.
"""

import hashlib

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from clex_train.utils.locations import ROOT
from launch import study_record, study_tables
from launch.study_arms import JUDGING
from launch.study_record import Record
from launch.study_tables import Line

RECORD = ROOT / "benchmarks" / "results" / "study_2026-12.json"
FIGURE = ROOT / "docs" / "results.png"
DIGEST = "record"
"""Key of the text in the PNG that says which record it shows."""

STYLES = {
    "CLEX, our recipe": ("#24292f", "o"),
    "static, from YaRN-16, as used": ("#d55e00", "s"),
    "YaRN, factor 16": ("#b87800", "v"),
    "CLEX of the first study, lr 5e-4": ("#cc79a7", ">"),
    "trained on, YaRN at the factor of the length": ("#0072b2", "D"),
    "base, LM-Infinite": ("#8c564b", "X"),
}
"""Label of a row -> colour and marker: one look in every facet."""


def main() -> None:
    """Draw the record into the PNG beside the page."""
    record = study_record.read(RECORD)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    one_shot, last_k = (_rows(record, protocol) for protocol in study_tables.PROTOCOLS)
    for name, row in one_shot.items():
        draw(left, record, name, {n: study_tables.perplexity(row, n) for n in row.nll})
    reference = last_k[record.reference]
    for name, row in last_k.items():
        if name != record.reference:
            draw(middle, record, name, *_differences(row, reference))
    for name in STYLES:
        draw(right, record, name, passkeys(record, name))
    middle.axhline(0, color=STYLES[record.reference][0], linewidth=1)
    middle.set_ylim(-15, 25)
    titles = {
        left: "perplexity, all tokens",
        middle: f"last {record.context_len} tokens: % above {record.reference!r}",
        right: "passkeys found, %",
    }
    for panel, title in titles.items():
        finish(panel, title, record.context_len)
    left.legend(fontsize=8.5, frameon=False, loc="upper left")
    figure.suptitle("A base of 2.2M parameters, L = 128, on held-out books; mean of the seeds", fontsize=11)
    figure.savefig(FIGURE, dpi=110, metadata={DIGEST: digest()})
    pyplot.close(figure)


def passkeys(record: Record, label: str) -> dict[int, float]:
    """Return the percent of passkeys that a row found, by length."""
    name = "forced_passkey_exact"
    own = [e.measures[name] for e in record.entries if (e.windows, e.label) == (JUDGING.name, label)]
    return {n: 100 * sum(e[n].total for e in own) / sum(e[n].count for e in own) for n in own[0]}


def draw(
    panel: Axes, record: Record, name: str, values: dict[int, float], errors: dict[int, float] | None = None
) -> None:
    """Draw a row as a line, with bars where it has errors."""
    colour, marker = STYLES[name]
    # Side by side, or bars of one length would hide each other.
    shift = 1.03 ** (list(STYLES).index(name) - len(STYLES) / 2)
    panel.errorbar(
        [length * shift for length in values],
        list(values.values()),
        None if errors is None else list(errors.values()),
        label=name,
        color=colour,
        marker=marker,
        linewidth=2.6 if name == next(iter(STYLES)) else 1.5,
        markersize=6,
        capsize=2,
    )


def finish(panel: Axes, title: str, unit: int) -> None:
    """Set title, grid and ticks of a panel."""
    lengths = [unit * 2**k for k in range(6)]
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{length:,}\n{length // unit}x" for length in lengths])
    panel.minorticks_off()
    panel.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    panel.grid(axis="y", color="#dfe3e7")
    panel.spines[["top", "right"]].set_visible(False)


def digest() -> str:
    """Return a hash of the record that the figure shows."""
    return hashlib.sha256(RECORD.read_bytes()).hexdigest()


def recorded_digest() -> str | None:
    """Return the hash in the PNG."""
    with Image.open(FIGURE) as image:
        return image.info.get(DIGEST)


def _rows(record: Record, protocol: str) -> dict[str, Line]:
    found = {row.label: row for row in study_tables.lines(record.entries, JUDGING.name, protocol)}
    return {name: found[name] for name in STYLES}


def _differences(row: Line, reference: Line) -> tuple[dict[int, float], dict[int, float]]:
    found = {n: study_tables.percent(row, reference, n) for n in row.nll}
    return {n: value for n, (value, _) in found.items()}, {n: error for n, (_, error) in found.items()}


if __name__ == "__main__":
    main()
