"""Which prompts are asked: tasks x lengths x depths x prompts, each a pure function of (seed, task, length, index).

A prompt of one index hides the same thing at every depth, so that depths compare. The tokens to generate are the same
for all prompts of a task at a length, and enough for the longest of their answers.
"""

from dataclasses import dataclass, field

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.retrieval import DOWNLOADED, Task, expand
from clex_train.data.store import TokenStore
from clex_train.evaluation.retrieval.haystack import Documents
from clex_train.evaluation.retrieval.prompts import Ask, Draft, Prompt, answer_len, fit, frame_len
from clex_train.evaluation.retrieval.tasks import TASKS, RetrievalTask
from clex_train.utils import distributed, log
from clex_train.utils.bounds import require
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.seeding import generator

logger = log.get(__name__)


@dataclass(frozen=True)
class Cell:
    """The prompts of one task at one length; `ValueError` if the length has no room for frame and answer."""

    name: Task
    length: int
    """Tokens of the prompt and of the answer together, at most."""
    depths: tuple[float | None, ...]
    num_prompts: int
    seed: int
    tokenizer: Tokenizer = field(repr=False)
    documents: Documents | None = field(default=None, repr=False)
    """Real text, for the tasks that hide something in it."""
    bos: bool | None = None
    """Whether prompts begin with BOS; None: as the tokenizer does."""
    in_chat: bool = False
    """Whether prompts are a user's turn in the tokenizer's chat template, which then puts BOS."""
    num_new: int = field(init=False)
    """Tokens to generate."""
    shortest: int = field(init=False)
    """Tokens of the shortest prompt without filler: no prompt has fewer."""

    def __post_init__(self) -> None:
        drafts = [self.draft(index) for index in range(self.num_prompts)]
        frames = [frame_len(self.tokenizer, draft, self.bos, self.in_chat) for draft in drafts]
        num_new = max(answer_len(self.tokenizer, draft.answers) for draft in drafts)
        if max(frames) + num_new > self.length:
            raise ConfigError(
                "evaluation.task_lengths",
                self.length,
                f"{self.name.value} needs at least {max(frames) + num_new} "
                f"tokens ({max(frames)} of question and hidden text, {num_new} of answer); "
                "name greater lengths or leave the task out",
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
        return self.task.draft(Ask(rng, self.length, depth or 0.0, self.documents))

    def prompt(self, number: int) -> Prompt:
        """Prompt `number` (0..size-1): all of the first depth, then all of the second."""
        depth, index = divmod(number, self.num_prompts)
        return fit(self.tokenizer, self.draft(index, self.depths[depth]), self.prompt_len, self.bos, self.in_chat)

    def judge(self, number: int, generation: str) -> float:
        """Share (0..1) of what prompt `number` expects that the generation has."""
        return self.task.judge(generation, self.draft(number % self.num_prompts).answers)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Refuse by `ValueError` with the remedy a tokenizer that has no chat template."""
    require(
        getattr(tokenizer, "chat_template", None) is not None,
        "chat_template",
        True,
        "the tokenizer has no chat template; leave the key out, or put the instruct model's chat_template.jinja "
        "beside the tokenizer's files",
    )


def of_spec(
    spec: EvaluationConfig, tokenizer: Tokenizer, store: TokenStore, seed: int = 0, bos: bool | None = None
) -> list[Cell]:
    """List the cells that `evaluation.tasks` and its companions ask for, real text from the split `store`.

    Task by task, shorter lengths first; `ValueError` names the first length that has no room. `bos` says whether
    prompts begin with BOS; None: as the tokenizer does.
    """
    if Task.ruler in spec.tasks and distributed.is_main():
        left_out = " and ".join(task.value for task in DOWNLOADED)
        logger.info("evaluation.tasks=ruler: without %s, whose questions would have to be downloaded", left_out)
    if spec.tasks and spec.chat_template:
        require_chat_template(tokenizer)
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
