"""Plot document lengths as a PNG: per doubling of the length, the share of a split's documents and tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clex_train.utils.files import make_folder, write_atomically
from data_prep.statistics import Statistics

COLORS = {"train": "#3366AA", "validation": "#DD8833"}


def plot(statistics: Mapping[str, Statistics], title: str, path: Path) -> None:
    """Draw the splits of a store side by side; `statistics` contains only splits with documents."""
    import matplotlib

    # Nodes of a cluster have no display, where the default back end fails.
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    classes = _classes(statistics)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), dpi=150, layout="constrained", sharex=True)
    _draw(above, {split: found.documents for split, found in statistics.items()}, classes)
    _draw(below, {split: found.tokens for split, found in statistics.items()}, classes)
    above.set_ylabel("share of documents (%)")
    below.set_ylabel("share of tokens (%)")
    below.set_xticks(np.arange(len(classes)), [_name(power) for power in classes])
    below.set_xlabel("tokens of a document, EOS included: from this length to twice it")
    labels = {
        split: f"{split} ({found.documents.sum():,} documents, {found.tokens.sum():,} tokens)"
        for split, found in statistics.items()
    }
    # One legend for both axes: the colors mean the same.
    handles = above.get_legend_handles_labels()[0]
    figure.legend(handles, list(labels.values()), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"Document lengths of {title}", x=0.01, ha="left", fontsize=13)
    # Drawn to memory and written atomically: an interrupted program must not leave half a PNG.
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".") or None)
    make_folder(path.parent)
    write_atomically(path, drawn.getvalue())
    plt.close(figure)


def _classes(statistics: Mapping[str, Statistics]) -> range:
    ranges = [found.classes() for found in statistics.values()]
    return range(min(r.start for r in ranges), max(r.stop for r in ranges))


def _draw(axes: Any, counts: Mapping[str, np.ndarray], classes: range) -> None:
    width = 0.8 / len(counts)
    for i, (split, values) in enumerate(counts.items()):
        shares = 100 * values[classes.start : classes.stop] / values.sum()
        places = np.arange(len(classes)) + (i - (len(counts) - 1) / 2) * width
        axes.bar(places, shares, width, color=COLORS[split], label=split)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(power: int) -> str:
    """Format 2^power with the binary prefixes of context lengths: 8K is 8,192."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if power >= shift:
            return f"{1 << (power - shift)}{unit}"
    return str(1 << power)
