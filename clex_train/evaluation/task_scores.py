"""Scores of retrieval tasks, as an evaluation file stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_CHARACTERS = 500
"""Longest expected or generated text that a file stores, in characters."""


@dataclass(frozen=True)
class TaskScore:
    """Score of a retrieval task by a method at a length, and at a depth if the task has depths."""

    task: str
    method: str
    length: int
    """Maximum tokens of prompt and answer together."""
    depth: float | None
    """Position of the answer in the text, from 0 (start) to 1 (end)."""
    correct: int
    """Number of prompts answered completely."""
    total: int
    """Number of prompts."""
    score: float
    """Mean share of the expected strings, 0 to 1."""
    seed: int | None = None
    """Seed of the prompts, which also depend on task, length and number; None in files of older versions."""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """For each prompt: number, fingerprint of its tokens, expected and generated text, share."""
    copied_from: str = ""
    """Key of the score that this one equals by definition and was copied from; empty if it was computed."""

    @property
    def key(self) -> str:
        """`<task>/<method>/<length>`, shared by all depths."""
        return task_key(self.task, self.method, self.length)


def task_key(task: str, method: str, length: int) -> str:
    """Return `<task>/<method>/<length>`."""
    return f"{task}/{method}/{length}"


def task_metrics(tasks: Sequence[TaskScore]) -> dict[str, float]:
    """Map `<task>/<method>/<length>` to the mean score over the prompts of all depths."""
    # Weighted by the number of prompts, which may differ between depths.
    rows = {score.key: [other for other in tasks if other.key == score.key] for score in tasks}
    return {
        key: sum(row.score * row.total for row in same) / sum(row.total for row in same) for key, same in rows.items()
    }
