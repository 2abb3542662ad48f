"""The figure of docs/first_study.md, drawn from the tables on that page.

    python docs/results_figure.py

Four facets of one study: perplexity of the base, of the base trained on, and of methods that were trained; then what
separates the close ones from our recipe, in percent, with the errors of paired differences. The perplexities of two
methods have large errors in common, those of the books, so overlapping bars of perplexity say little about their order.
"""

import hashlib
import re
from itertools import takewhile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

PAGE = Path(__file__).with_name("first_study.md")
FIGURE = Path(__file__).with_name("results.png")
PERPLEXITY = "Perplexity, `one_shot`"
REFERENCE = "CLEX, our recipe"
DIFFERENCE = "Percent above our recipe"
"""Openings of the sentences above the tables."""
DIGEST = "tables"
"""Key of the text in the PNG that says which numbers it shows."""

Numbers = list[tuple[float, float]]
"""(value, standard error) for each length."""

CLOSE = ("NTK, factor 16", "YaRN, factor 16", "theta 1e6", "CLEX, t of the length", "CLEX, lr_scale 0.05")
FROZEN = ("CLEX frozen at zero", "CLEX frozen at zero, t of the length")
UNTRAINED = ("plain RoPE", "PI", "NTK(2t-1)", "dynamic NTK", "YaRN", "theta 1e6", "LM-Infinite")
FACETS = {
    "the base, as it is": [f"base, {name}" for name in UNTRAINED],
    "the base trained on at 128 tokens": [f"trained on, {UNTRAINED[i]}" for i in (0, 2, 4, 6)],
    "trained with a scaling": ["PI, factor 16", *CLOSE[:3], "RandomPos", "CLEX, the paper's recipe", REFERENCE],
}
STYLES = (
    ("plain RoPE", "#0072b2", "o"),
    ("PI", "#d55e00", "s"),
    ("dynamic NTK", "#cc79a7", "^"),
    ("NTK", "#009e73", "D"),
    ("YaRN", "#b87800", "v"),
    ("theta", "#56b4e9", "P"),
    ("LM-Infinite", "#8c564b", "X"),
    ("RandomPos", "#7b61b5", "<"),
    ("the paper's recipe", "#cc79a7", ">"),
    (REFERENCE, "#24292f", "o"),
    ("CLEX, t of the length", "#24292f", "*"),
    ("lr_scale", "#7b61b5", "<"),
    ("CLEX frozen at zero, t", "#cc79a7", "^"),
    ("CLEX frozen at zero", "#8c564b", "X"),
)
"""(part of a label, colour, marker): the first that matches, so that a formula has one colour in every facet."""


def main() -> None:
    """Draw the tables of the page into the PNG beside it."""
    text = PAGE.read_text(encoding="utf-8")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.2), layout="constrained")
    lengths, perplexity = table(text, PERPLEXITY)
    facets = list(FACETS.items())
    for panel, (title, names) in zip(axes.flat[:3], facets, strict=True):
        draw(panel, title, lengths, {name: perplexity[name] for name in names})
        panel.set_ylabel("perplexity (lower is better)")
        # One scale, so that panels can be compared.
        panel.set_ylim(38, 122)
    panel = axes.flat[3]
    differences = table(text, DIFFERENCE)[1]
    close = {name: differences[name] for name in (*CLOSE, *FROZEN)}
    draw(panel, f"percent above {REFERENCE!r}, paired errors", lengths, close)
    panel.axhline(0, color="#24292f", linewidth=1)
    # Room for the legend above the lines.
    panel.set_ylim(-1.2, 4.6)
    panel.set_ylabel("% (above 0 is worse)")
    what = "one_shot on books, 30 windows of 2,048 tokens, mean of the seeds, ± one standard error"
    figure.suptitle(f"Perplexity against length: {what}", fontsize=12)
    figure.savefig(FIGURE, dpi=110, metadata={DIGEST: digest(text)})
    pyplot.close(figure)


def draw(panel: Axes, title: str, lengths: list[int], rows: dict[str, Numbers]) -> None:
    """Draw a line with error bars for each row, no colour twice."""
    for i, (name, numbers) in enumerate(rows.items()):
        values, errors = zip(*numbers, strict=True)
        # Bars of one length would hide each other.
        shifted = [length * 1.03 ** (i - len(rows) / 2) for length in lengths]
        colour, marker = style(name)
        panel.errorbar(
            shifted,
            values,
            errors,
            label=name,
            color=colour,
            marker=marker,
            linewidth=2.6 if name == REFERENCE else 1.5,
            markersize=6,
            capsize=2,
            elinewidth=0.9,
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{length:,}\n{length // lengths[0]}x" for length in lengths])
    panel.minorticks_off()
    panel.set_title(title, fontsize=11, loc="left", fontweight="bold")
    panel.grid(axis="y", color="#dfe3e7")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8.5, frameon=False, loc="upper left")


def style(name: str) -> tuple[str, str]:
    """Return colour and marker of a row."""
    return next((colour, marker) for part, colour, marker in STYLES if part in name)


def table(text: str, title: str) -> tuple[list[int], dict[str, Numbers]]:
    """Return the lengths of a table of the page and the numbers of each row; `0` alone has no error."""
    lines = section(text, title).splitlines()
    lengths = [int(n) for n in re.findall(r"\((\d+)\)", lines[0])]
    rows = {}
    for line in lines[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        pairs = [[float(number) for number in cell.split(" ± ")] for cell in cells[: len(lengths)]]
        rows[name] = [(pair[0], pair[1] if len(pair) > 1 else 0.0) for pair in pairs]
    return lengths, rows


def section(text: str, opening: str) -> str:
    """Return the lines of the first table below a sentence."""
    below = text.split(f"\n{opening}", 1)[1].splitlines()
    begin = next(i for i, line in enumerate(below) if line.startswith("|"))
    return "\n".join(takewhile(lambda line: line.startswith("|"), below[begin:]))


def digest(text: str) -> str:
    """Return a hash of the tables that the figure shows."""
    return hashlib.sha256((section(text, PERPLEXITY) + section(text, DIFFERENCE)).encode()).hexdigest()


def recorded_digest() -> str | None:
    """Return the hash in the PNG."""
    with Image.open(FIGURE) as image:
        return image.info.get(DIGEST)


if __name__ == "__main__":
    main()
