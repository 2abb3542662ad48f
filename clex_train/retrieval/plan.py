"""Plan of the retrieval prompts: tasks x lengths x depths x prompts.

Each prompt is a pure function of (seed, task, length, index), and hides the same text at every depth, so that depths
are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.retrieval import DOWNLOADED, Task, expand
from clex_train.retrieval.haystack import Documents
from clex_train.retrieval.prompts import Ask, Draft, Prompt, answer_len, fit, frame_len
from clex_train.retrieval.tasks import TASKS, RetrievalTask
from clex_train.utils import distributed, log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.seeding import generator

if TYPE_CHECKING:
    from clex_train.token_store.store import TokenStore

logger = log.get(__name__)


@dataclass(frozen=True)
class Cell:
    """Prompts of one task at one length. Raises `ConfigError` when question and answer alone exceed the length."""

    name: Task
    length: int
    """Maximum tokens of prompt and answer together."""
    depths: tuple[float | None, ...]
    num_prompts: int
    seed: int
    tokenizer: Tokenizer = field(repr=False)
    documents: Documents | None = field(default=None, repr=False)
    """Real text, for the tasks that need it."""
    bos: bool | None = None
    """True starts prompts with BOS, False removes it, None follows the tokenizer."""
    in_chat: bool = False
    """True makes prompts a user's turn in the tokenizer's chat template, which then adds BOS itself."""
    num_new: int = field(init=False)
    """Tokens to generate."""
    shortest: int = field(init=False)
    """Tokens of the shortest prompt without filler: a lower bound for all prompts."""

    @property
    def title(self) -> str:
        """Name of the task."""
        return self.name.value

    def __post_init__(self) -> None:
        drafts = [self.draft(index) for index in range(self.num_prompts)]
        frames = [frame_len(self.tokenizer, draft, self.bos, self.in_chat) for draft in drafts]
        # The same for all prompts: under ZeRO-3 every rank must run the same number of forwards.
        num_new = max(answer_len(self.tokenizer, draft.answers) for draft in drafts)
        if max(frames) + num_new > self.length:
            raise ConfigError(
                "evaluation.task_lengths",
                self.length,
                f"{self.name.value} needs at least {max(frames) + num_new} "
                f"tokens ({max(frames)} of question and hidden text, {num_new} of answer); "
                "name greater lengths or leave the task out",
            )
        # The dataclass is frozen.
        object.__setattr__(self, "num_new", num_new)
        object.__setattr__(self, "shortest", min(frames))

    @property
    def task(self) -> RetrievalTask:
        """Functions that draft its prompts and judge the answers."""
        return TASKS[self.name]

    @property
    def prompt_len(self) -> int:
        """Maximum tokens of a prompt."""
        return self.length - self.num_new

    @property
    def size(self) -> int:
        """Number of prompts at all depths together."""
        return len(self.depths) * self.num_prompts

    def num_chunks(self, chunk_len: int) -> int:
        """Return the number of chunks of about `chunk_len` tokens, the same for each prompt."""
        # No more chunks than the shortest prompt has tokens, so that every prompt can be split into as many.
        return min(-(-self.prompt_len // chunk_len), self.shortest)

    def draft(self, index: int, depth: float | None = None) -> Draft:
        """Draft prompt `index` (0..num_prompts-1), without filler."""
        # The generator does not depend on the depth, so that all depths hide the same text.
        rng = generator(self.seed, f"retrieval_{self.name.value}", self.length, index)
        return self.task.draft(Ask(rng, self.length, depth or 0.0, self.documents))

    def prompt(self, number: int) -> Prompt:
        """Build prompt `number` (0..size-1): all of the first depth come first, then all of the second."""
        depth, index = divmod(number, self.num_prompts)
        return fit(self.tokenizer, self.draft(index, self.depths[depth]), self.prompt_len, self.bos, self.in_chat)

    def judge(self, number: int, generation: str) -> float:
        """Return the share (0 to 1) of the expected strings of prompt `number` that are in the generation."""
        return self.task.judge(generation, self.draft(number % self.num_prompts).answers)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` with the remedy for a tokenizer without a chat template."""
    require(
        getattr(tokenizer, "chat_template", None) is not None,
        "chat_template",
        True,
        "the tokenizer has no chat template; leave the key out, or copy the instruct model's chat_template.jinja "
        "into the tokenizer's folder",
    )


def build_cells(
    spec: EvaluationConfig, tokenizer: Tokenizer, store: TokenStore, seed: int = 0, bos: bool | None = None
) -> list[Cell]:
    """List the cells of `evaluation.tasks`, task by task, shorter lengths first. Real text comes from `store`.

    `bos` as in `Cell`. Raises `ConfigError` for the first length that is too short.
    """
    if Task.ruler in spec.tasks and distributed.is_main():
        left_out = " and ".join(task.value for task in DOWNLOADED)
        logger.info("evaluation.tasks=ruler: leaving out %s, whose questions would have to be downloaded", left_out)
    if spec.tasks and spec.chat_template:
        require_chat_template(tokenizer)
    # Only reads when a task draws from it, so tasks without real text need no documents.
    documents = Documents(store, tokenizer)
    return [
        Cell(
            name=task,
            length=length,
            depths=tuple(spec.depths) if TASKS[task].has_depth else (None,),
            num_prompts=spec.num_prompts,
            seed=seed,
            tokenizer=tokenizer,
            documents=documents,
            bos=bos,
            in_chat=spec.chat_template,
        )
        for task in expand(spec.tasks)
        for length in sorted(set(spec.lengths_of_tasks()))
    ]
