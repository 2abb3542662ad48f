"""Which prompts are asked: tasks x lengths x depths x prompts, each a pure function of (seed, task, length, index).

A prompt of one index hides the same thing at every depth, so that depths compare. The tokens to generate are the same
for all prompts of a task at a length, and enough for the longest of their answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clex_train.evaluation.retrieval.prompts import Draft, Prompt, answer_len, fit, frame_len
from clex_train.evaluation.retrieval.tasks import TASKS, RetrievalTask
from clex_train.seeding import generator
from clex_train.settings.evaluation import EvaluationConfig
from clex_train.settings.retrieval import Task, expand


@dataclass(frozen=True)
class Cell:
    """The prompts of one task at one length; `ValueError` if the length has no room for frame and answer."""

    name: Task
    length: int
    """Tokens of the prompt and of the answer together, at most."""
    depths: tuple[float | None, ...]
    num_prompts: int
    seed: int
    tokenizer: Any = field(repr=False)
    num_new: int = field(init=False)
    """Tokens to generate."""
    shortest: int = field(init=False)
    """Tokens of the shortest prompt without filler: no prompt has fewer."""

    def __post_init__(self) -> None:
        drafts = [self.draft(index) for index in range(self.num_prompts)]
        frames = [frame_len(self.tokenizer, draft) for draft in drafts]
        num_new = max(answer_len(self.tokenizer, draft.answers) for draft in drafts)
        if max(frames) + num_new > self.length:
            raise ValueError(
                f"evaluation.task_lengths={self.length}: {self.name.value} needs at least {max(frames) + num_new} "
                f"tokens ({max(frames)} of question and hidden text, {num_new} of answer); "
                "name greater lengths or leave the task out"
            )
        object.__setattr__(self, "num_new", num_new)
        object.__setattr__(self, "shortest", min(frames))

    @property
    def task(self) -> RetrievalTask:
        """How prompts are made and answers judged."""
        return TASKS[self.name]

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt, at most."""
        return self.length - self.num_new

    @property
    def size(self) -> int:
        """Prompts at all depths."""
        return len(self.depths) * self.num_prompts

    def num_chunks(self, chunk_len: int) -> int:
        """Pieces of about `chunk_len` tokens that each of the prompts is read in."""
        return min(-(-self.prompt_len // chunk_len), self.shortest)

    def draft(self, index: int, depth: float | None = None) -> Draft:
        """Prompt `index` (0..num_prompts-1) before filler is laid."""
        rng = generator(self.seed, f"retrieval_{self.name.value}", self.length, index)
        return self.task.draft(rng, depth or 0.0)

    def prompt(self, number: int) -> Prompt:
        """Prompt `number` (0..size-1): all of the first depth, then all of the second."""
        depth, index = divmod(number, self.num_prompts)
        return fit(self.tokenizer, self.draft(index, self.depths[depth]), self.prompt_len)

    def judge(self, number: int, generation: str) -> float:
        """Share (0..1) of what prompt `number` expects that the generation has."""
        return self.task.judge(generation, self.draft(number % self.num_prompts).answers)


def of_spec(spec: EvaluationConfig, tokenizer: Any, seed: int = 0) -> list[Cell]:
    """The cells that `evaluation.tasks` and its companions ask for; `ValueError` as of `make_cells`."""
    return make_cells(tokenizer, spec.tasks, spec.lengths_of_tasks(), spec.depths, spec.num_prompts, seed)


def make_cells(
    tokenizer: Any, tasks: Sequence[Task], lengths: Sequence[int], depths: Sequence[float], num_prompts: int, seed: int
) -> list[Cell]:
    """All cells, task by task, shorter lengths first; `ValueError` names the first that has no room."""
    return [
        Cell(task, length, tuple(depths) if TASKS[task].has_depth else (None,), num_prompts, seed, tokenizer)
        for task in expand(tasks)
        for length in sorted(set(lengths))
    ]
