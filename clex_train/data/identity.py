"""What a checkpoint has to know of the order its rows came in, so that a resumed run may change only what is ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.config.data import DataConfig, parse_ranges
from clex_train.data.order import original_index
from clex_train.utils import records

DataOrder = dict[str, list[Any]]
"""`weights`: pairs [first row, weight of each domain]; `skip_rows`: half-open pairs; ascending, as in JSON."""


@dataclass(frozen=True)
class _Schema:
    """What a `DataOrder` has to be, for one that was read from a file."""

    weights: list[tuple[records.Count, dict[str, float]]] = field(default_factory=list)
    skip_rows: list[tuple[records.Count, records.Count]] = field(default_factory=list)


def data_order(data: DataConfig, batch_rows: int) -> DataOrder:
    """The record of a run's settings; rows are counted with those that are left out."""
    phases = data.weights() if data.domains else {}
    return {
        "weights": [[step * batch_rows, weights] for step, weights in phases.items()],
        "skip_rows": [list(pair) for pair in parse_ranges(data.skip_rows)],
    }


def require_order(order: DataOrder, path: Path) -> None:
    """Raise `files.BadFile` for an order, read from the file `path`, that `data_order` would not have written."""
    records.decode(order, _Schema, path)


def consumed(order: DataOrder, num_rows: int) -> DataOrder:
    """What of an order has decided the first `num_rows` rows; an empty record is one store without skipped rows."""
    skipped = order.get("skip_rows", [])
    stop = original_index(skipped, num_rows - 1) + 1 if num_rows else 0
    return {
        "weights": [phase for phase in order.get("weights", []) if phase[0] < stop],
        "skip_rows": [[first, min(last, stop)] for first, last in skipped if first < stop],
    }
