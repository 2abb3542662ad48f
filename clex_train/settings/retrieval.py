"""The retrieval tasks by name, and which of them a group stands for."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from clex_train.settings.bounds import require


class Task(Enum):
    passkey = "passkey"
    passkey_infinitebench = "passkey_infinitebench"


GROUPS: dict[Task, tuple[Task, ...]] = {}


def expand(tasks: Sequence[Task]) -> list[Task]:
    """The single tasks that `tasks` names, groups opened, each once, in the order of naming."""
    return list(dict.fromkeys(single for task in tasks for single in GROUPS.get(task, (task,))))


def check(num_prompts: int, depths: Sequence[float], lengths: Sequence[int] | None) -> None:
    """`ValueError` by key for what no prompt can be made from."""
    require(num_prompts >= 1, "evaluation.num_prompts", num_prompts, "at least 1 prompt for each depth and length")
    good = len(depths) > 0 and all(0 <= depth <= 1 for depth in depths)
    require(good, "evaluation.depths", list(depths), "one or more places from 0 (start) to 1 (end)")
    require(
        lengths is None or (len(lengths) > 0 and all(n >= 2 for n in lengths)),
        "evaluation.task_lengths",
        lengths,
        "one or more lengths of at least 2 tokens",
    )
