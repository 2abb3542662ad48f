"""Retrieval tasks by name, with the functions that draft prompts and judge answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clex_train.config.retrieval import Task
from clex_train.retrieval import counting, needle, niah, passkey, tracing
from clex_train.retrieval.niah import Needles
from clex_train.retrieval.prompts import Ask, Draft
from clex_train.retrieval.scoring import first_number, share_contained
from clex_train.retrieval.words import uuid


@dataclass(frozen=True)
class RetrievalTask:
    """A task: `draft(ask)` builds a prompt, `judge(generation, answers)` returns the share (0 to 1) that was found."""

    draft: Callable[[Ask], Draft]
    judge: Callable[[str, Sequence[str]], float] = share_contained
    has_depth: bool = False
    """True for tasks with prompts at every depth of the grid; others choose random depths themselves."""


TASKS: dict[Task, RetrievalTask] = {
    Task.passkey: RetrievalTask(passkey.lm_infinite, first_number, has_depth=True),
    Task.passkey_infinitebench: RetrievalTask(passkey.infinitebench, first_number, has_depth=True),
    Task.needle: RetrievalTask(needle.draft, first_number, has_depth=True),
    Task.niah_single_1: RetrievalTask(Needles(niah.noise_haystack)),
    Task.niah_single_2: RetrievalTask(Needles(niah.document_haystack)),
    Task.niah_single_3: RetrievalTask(Needles(niah.document_haystack, draw_value=uuid, what="uuid")),
    Task.niah_multikey_1: RetrievalTask(Needles(niah.document_haystack, num_keys=4)),
    Task.niah_multikey_2: RetrievalTask(Needles(niah.needle_haystack)),
    Task.niah_multikey_3: RetrievalTask(Needles(niah.needle_haystack, draw_value=uuid, what="uuid", keys=niah.uuids)),
    Task.niah_multivalue: RetrievalTask(Needles(niah.document_haystack, num_values=4)),
    Task.niah_multiquery: RetrievalTask(Needles(niah.document_haystack, num_keys=4, num_queries=4)),
    Task.vt: RetrievalTask(tracing.variable_tracking),
    Task.cwe: RetrievalTask(counting.common_words),
    Task.fwe: RetrievalTask(counting.frequent_words),
}
