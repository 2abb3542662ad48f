"""Record of a run's data order in its checkpoints: a resumed run may change only the rows that are still ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.config.data import DataConfig, parse_ranges
from clex_train.data.sampler import original_index
from clex_train.utils import records

DataOrder = dict[str, list[Any]]
"""`weights`: pairs [first row, weight per domain]; `skip_rows`: half-open [start, stop] pairs; both ascending."""


@dataclass(frozen=True)
class _Schema:
    """Types of a `DataOrder` that is read from a file."""

    weights: list[tuple[records.Count, dict[str, float]]] = field(default_factory=list)
    skip_rows: list[tuple[records.Count, records.Count]] = field(default_factory=list)


def data_order(data: DataConfig, batch_rows: int) -> DataOrder:
    """Return the record for a config; row numbers include skipped rows."""
    phases = data.weights() if data.domains else {}
    return {
        "weights": [[step * batch_rows, weights] for step, weights in phases.items()],
        # Lists, not tuples: the record must compare equal after a round trip through JSON.
        "skip_rows": [list(pair) for pair in parse_ranges(data.skip_rows)],
    }


def require_order(order: DataOrder, path: Path) -> None:
    """Raise `files.BadFile` if an order read from `path` is not one that `data_order` writes."""
    records.decode(order, _Schema, path)


def consumed_order(order: DataOrder, num_rows: int) -> DataOrder:
    """Cut an order down to the part that determined the first `num_rows` rows."""
    # Missing keys come from checkpoints written before mixtures: one store, no skipped rows.
    skipped = order.get("skip_rows", [])
    # The last consumed row is `num_rows - 1` among the kept rows; skipped rows shift it in the full order.
    stop = original_index(skipped, num_rows - 1) + 1 if num_rows else 0
    return {
        "weights": [phase for phase in order.get("weights", []) if phase[0] < stop],
        "skip_rows": [[first, min(last, stop)] for first, last in skipped if first < stop],
    }
