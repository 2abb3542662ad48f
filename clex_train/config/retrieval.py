"""Retrieval tasks by name, and groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from clex_train.utils.errors import require


class Task(Enum):
    """Retrieval tasks."""

    passkey = "passkey"
    passkey_infinitebench = "passkey_infinitebench"
    needle = "needle"
    niah_single_1 = "niah_single_1"
    niah_single_2 = "niah_single_2"
    niah_single_3 = "niah_single_3"
    niah_multikey_1 = "niah_multikey_1"
    niah_multikey_2 = "niah_multikey_2"
    niah_multikey_3 = "niah_multikey_3"
    niah_multivalue = "niah_multivalue"
    niah_multiquery = "niah_multiquery"
    vt = "vt"
    cwe = "cwe"
    fwe = "fwe"
    qa_1 = "qa_1"
    qa_2 = "qa_2"
    ruler = "ruler"


DOWNLOADED = (Task.qa_1, Task.qa_2)
"""RULER's question answering: needs SQuAD and HotpotQA, which cannot be generated."""

GROUPS: dict[Task, tuple[Task, ...]] = {
    Task.ruler: (
        Task.niah_single_1,
        Task.niah_single_2,
        Task.niah_single_3,
        Task.niah_multikey_1,
        Task.niah_multikey_2,
        Task.niah_multikey_3,
        Task.niah_multivalue,
        Task.niah_multiquery,
        Task.vt,
        Task.cwe,
        Task.fwe,
    )
}


def expand(tasks: Sequence[Task]) -> list[Task]:
    """Expand groups to single tasks without duplicates, in the given order."""
    # dict.fromkeys removes duplicates and keeps the order.
    return list(dict.fromkeys(single for task in tasks for single in GROUPS.get(task, (task,))))


def check(tasks: Sequence[Task], num_prompts: int, depths: Sequence[float], lengths: Sequence[int] | None) -> None:
    """Raise `ConfigError` by key for settings from which no prompt can be made."""
    # Refuse before any model is loaded.
    for task in tasks:
        known = "it needs SQuAD or HotpotQA, which are not generated here; use lm-eval, or leave it out"
        require(task not in DOWNLOADED, "evaluation.tasks", task.value, known)
    # A depth without prompts would be an empty cell in every table.
    require(num_prompts >= 1, "evaluation.num_prompts", num_prompts, "at least 1 prompt for each depth and length")
    good = len(depths) > 0 and all(0 <= depth <= 1 for depth in depths)
    require(good, "evaluation.depths", list(depths), "one or more places from 0 (start) to 1 (end)")
    require(
        lengths is None or (len(lengths) > 0 and all(n >= 2 for n in lengths)),
        "evaluation.task_lengths",
        lengths,
        "one or more lengths of at least 2 tokens",
    )
