"""Summary of a packing in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackingSummary:
    """Statistics of a packing; `str(summary)` is the line that a run prints at startup."""

    num_rows: int
    """Rows of one pass."""
    utilisation: float
    """Share of tokens that are not padding, in [0, 1]."""
    num_cut: int
    """Documents that are split across rows or not read to their end."""
    documents_per_row: float
    """Mean number of documents, or pieces of them, in a row."""
    num_sampled: int | None = None
    """Rows that the last two are estimated from; None if they are exact."""

    def __str__(self) -> str:
        about = "" if self.num_sampled is None else "about "
        sample = "" if self.num_sampled is None else f" (from {self.num_sampled:,} sampled rows)"
        return (
            f"{100 * self.utilisation:.4g} % of their tokens used, "
            f"{about}{self.num_cut:,} documents cut, {about}{self.documents_per_row:.3g} documents a sequence{sample}"
        )
