"""Every retrieval task by name: what makes its prompts and what judges the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clex_train.evaluation.retrieval import passkey, scoring
from clex_train.evaluation.retrieval.prompts import Draft
from clex_train.settings.retrieval import Task

Judge = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class RetrievalTask:
    """`draft(rng, depth)` makes a prompt's text, `judge(generation, answers)` is the share (0..1) that was found."""

    draft: Callable[[np.random.Generator, float], Draft]
    judge: Judge
    has_depth: bool = True
    """Whether prompts are made at every depth of the grid; others place what they hide by themselves."""


TASKS: dict[Task, RetrievalTask] = {
    Task.passkey: RetrievalTask(passkey.lm_infinite, scoring.first_number),
    Task.passkey_infinitebench: RetrievalTask(passkey.infinitebench, scoring.first_number),
}
