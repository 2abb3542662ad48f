"""EleutherAI's lm-evaluation-harness (`lm-eval`: LongBench, RULER, ...) on a model with our frequencies.

The harness runs our model object, so every forward and every generated token uses the t of its length. Rows of a batch
share the t of the longest; with `batch_size=1` each prompt has its own. The package is optional, and only
this package imports it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from clex_train.evaluation.partial_results import Partial
from clex_train.harness.truncation import Message, Shortener, Truncation
from clex_train.utils import distributed, log, progress, seeding

if TYPE_CHECKING:
    from clex_train.harness.tasks import Tasks
    from clex_train.models.load import LoadedModel

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
CHOICE_LEN = 64
"""Tokens that a chat leaves for an answer that is scored and not generated."""
BATCHES = 8
"""Batches in a group of requests; the harness sorts a group by length."""

logger = log.get(__name__)


@dataclass(frozen=True)
class RequestSettings:
    """Settings of the requests to the model."""

    max_length: int
    """Tokens of prompt and generation together; longer prompts are truncated."""
    batch_size: int = 1
    """Prompts in a forward pass."""
    limit: int | None = None
    """Number of documents of each task, from the first; None for all."""
    num_fewshot: int | None = None
    """Examples before each question; None for the task's own number."""
    bos: bool | None = None
    """False removes BOS from prompts of a tokenizer that adds it; None follows the tokenizer."""
    in_chat: bool = False
    """True formats prompts with the tokenizer's chat template."""
    truncation: Truncation = Truncation.left
    """Part that longer prompts lose."""
    max_prompt: int | None = None
    """Most tokens of a prompt before the chat template, with `Truncation.middle`; None for all that fit."""


def evaluate(
    loaded: LoadedModel, tasks: Tasks, task: str, settings: RequestSettings, kept: Partial, method: str = ""
) -> tuple[dict[str, Any], int]:
    """Run the harness on one task; return its own results (`results`, `configs`, ...) and how many prompts lost tokens.

    Collective when the weights are sharded; every rank computes the same. `kept` has the answers of an interrupted
    evaluation, under the names of method and task.
    """
    # Requests are not split over ranks: under ZeRO-3 every forward is a collective.
    model = _model(loaded, settings)
    tasks.select(task)
    fit = _install_shortener(model, tasks.answer_len(task, CHOICE_LEN), settings)
    for kind in KINDS:
        answer = InGroups(kind, getattr(model, kind), kept, f"{method or 'model'}/{task}", settings.batch_size, fit)
        setattr(model, kind, answer)
    results = _simple_evaluate(model, tasks, task, settings)
    found: tuple[dict[str, Any], int] = distributed.broadcast_object((results, len(fit.shortener.shortened)))
    return found


@dataclass
class Fit:
    """Fits requests into the model's length."""

    shortener: Shortener
    model: Any
    in_chat: bool
    is_middle: bool

    def __call__(self, kind: str, requests: Sequence[Any]) -> None:
        """Shorten the prompts of these requests in place, and count those that the harness will cut."""
        # A document that is scored as a whole is read in windows; in chat, questions were cut before the template.
        if kind == KINDS[1] or (self.in_chat and self.is_middle):
            return
        for request in requests:
            text, more = request.args
            # The last token of an answer that is scored is not read.
            answer_len = self._generated(more) if kind == KINDS[2] else len(self._answer(more)) - 1
            fitting = self.shortener.fit(request.doc_id, text, answer_len)
            request.arguments = (fitting, more)

    def _generated(self, more: Any) -> int:
        return int(more.get("max_gen_toks", self.model.max_gen_toks))

    def _answer(self, text: str) -> list[int]:
        found: list[int] = self.model.tok_encode(text, add_special_tokens=False)
        return found


def _install_shortener(model: Any, answer_len: int, settings: RequestSettings) -> Fit:
    """Shorten questions before the chat template of this model, and return what fits prompts without one."""
    decode = partial(model.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    shortener = Shortener(model.tok_encode, decode, settings.max_length, settings.max_prompt, settings.truncation)
    own = model.apply_chat_template

    def rendered(chat_history: list[Message], add_generation_prompt: bool = True) -> Any:
        render = partial(own, add_generation_prompt=add_generation_prompt)
        return shortener.fit_chat(chat_history, answer_len, render)

    is_middle = settings.truncation is Truncation.middle
    if is_middle:
        model.apply_chat_template = rendered
    return Fit(shortener, model, settings.in_chat, is_middle)


@dataclass
class Counted:
    """Number and size of the requests of tasks."""

    tasks: int = 0
    prompts: list[int] = field(default_factory=list)
    """Tokens of each prompt after truncation."""
    generated: int = 0
    """Upper bound of generated tokens, without the first of each prompt, which costs no extra forward."""


def count(loaded: LoadedModel, tasks: Tasks, settings: RequestSettings) -> Counted:
    """Count the requests that `evaluate` would make, without a forward pass."""
    # The harness builds its requests only while it runs, so run it on a model whose answers are constants.
    model, counted = _model(loaded, settings), Counted()

    def without_answers(kind: str, nothing: object) -> Callable[..., list[object]]:
        def answer(requests: Sequence[Any], disable_tqdm: bool = False) -> list[object]:
            for request in requests:
                more = int(request.args[1].get("max_gen_toks", model.max_gen_toks)) if kind == KINDS[2] else 0
                text = request.args[0] + (request.args[1] if kind == KINDS[0] else "")
                num_tokens, most = len(model.tok_encode(text)), settings.max_length - more
                # A document longer than a window is read in several.
                pieces = -(-num_tokens // most) if kind == KINDS[1] else 1
                counted.prompts += [min(num_tokens, most)] * pieces
                counted.generated += max(0, more - 1)
            return [nothing] * len(requests)

        return answer

    for kind, nothing in zip(KINDS, ((0.0, False), 0.0, ""), strict=True):
        setattr(model, kind, without_answers(kind, nothing))
    for task in tasks.single:
        tasks.select(task)
        _simple_evaluate(model, tasks, task, settings)
        counted.tasks += 1
    return counted


def _model(loaded: LoadedModel, settings: RequestSettings) -> Any:
    """Wrap our model in the harness's `HFLM`."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        backend="causal",
        add_bos_token=settings.bos,
    )
    # HFLM takes the device of the first parameter, which may be offloaded to host memory.
    model._device = distributed.device()
    return model


def _simple_evaluate(model: Any, tasks: Tasks, task: str, settings: RequestSettings) -> Any:
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=tasks.manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        # For metrics without a closed-form error. lm-eval's default of 100,000 resamples takes longer than small tasks.
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=settings.in_chat,
    )


class InGroups:
    """Answers one kind of request in groups, and saves each group's answers for a resumed evaluation.

    A group has the requests of whole documents: one, or with batches several, so that an interruption changes no batch.
    Its key includes a hash of the requests, so that answers are not reused after a task's data have changed.
    """

    def __init__(
        self,
        kind: str,
        answer: Callable[..., list[Any]],
        kept: Partial,
        cell: str,
        batch_size: int,
        fit: Callable[[str, Sequence[Any]], None],
    ) -> None:
        self.kind, self._answer, self._kept, self._fit = kind, answer, kept, fit
        self._prefix = f"{cell}/{kind}"
        self._least = batch_size if batch_size == 1 else BATCHES * batch_size

    def __call__(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return the answers in the order of the requests."""
        self._fit(self.kind, requests)
        todo = {f"{self._prefix}/{i}/{_digest(group)}": group for i, group in enumerate(groups(requests, self._least))}
        found = {key: answers[0] for key in todo if (answers := self._kept.find([key], _answers))}
        self._log_found(requests, todo, found)
        with progress.bar(len(requests), f"lm_eval {self._prefix}", is_shown=distributed.is_main(), unit="req") as bar:
            for number, (key, group) in enumerate(todo.items()):
                if key not in found:
                    # Seeded per group, so that sampled answers do not depend on how many groups were resumed.
                    torch.manual_seed(seeding.torch_seed(0, self._prefix, number))
                    found[key] = self._answer(group, disable_tqdm=True)
                    self._kept.finish({key: found[key]}, at_once=False)
                bar.update(len(group))
        return [answer for key in todo for answer in found[key]]

    def _log_found(self, requests: Sequence[Any], todo: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        left = [key for key in self._kept.cells if key.startswith(f"{self._prefix}/")]
        if not left or not distributed.is_main():
            return
        number = sum(len(todo[key]) for key in found)
        others = len(left) - len(found)
        unused = f"; {others} groups are not reused: the tasks' data have changed" if others else ""
        logger.info(
            "%s: %d of %d requests found from an interrupted evaluation (%s)%s",
            self._prefix,
            number,
            len(requests),
            self._kept.path,
            unused,
        )


def groups(requests: Sequence[Any], least: int) -> list[list[Any]]:
    """Group requests by document, merging documents until a group has at least `least` requests."""
    found: list[list[Any]] = []
    for _, of_document in groupby(requests, key=lambda request: (request.task_name, request.doc_id)):
        if not found or len(found[-1]) >= least:
            found.append([])
        found[-1].extend(of_document)
    return found


def _digest(group: Sequence[Any]) -> str:
    content = json.dumps([request.args for request in group], default=str)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _answers(kept: Any) -> list[Any]:
    """Convert a group's answers back from JSON."""
    # JSON has no tuples, and log-likelihoods are pairs.
    return [tuple(answer) if isinstance(answer, list) else answer for answer in kept]
