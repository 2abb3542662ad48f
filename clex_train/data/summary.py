"""What a packing makes of a store, in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackingSummary:
    """`str(summary)` is what a run says of its rows at the start."""

    num_rows: int
    """Rows of one pass."""
    utilisation: float
    """Share of their tokens that are no padding."""
    num_cut: int
    """Documents that no row holds whole."""
    documents_per_row: float
    """Documents, or pieces of them, in a row on average."""
    num_sampled: int | None = None
    """Rows that the last two were estimated from; None if they are exact."""

    def __str__(self) -> str:
        about = "" if self.num_sampled is None else "about "
        sample = "" if self.num_sampled is None else f" (from {self.num_sampled:,} sampled rows)"
        return (
            f"{100 * self.utilisation:.4g} % of their tokens used, "
            f"{about}{self.num_cut:,} documents cut, {about}{self.documents_per_row:.3g} documents a sequence{sample}"
        )
