"""Prompts of a wanted length in tokens: a task says what is asked and how filler goes around it, `fit` how much.

A `Draft` is text as a function of the units of filler in it (sentences, words, tokens of a document). The largest
number of units is searched for whose text, encoded whole as a user would, stays within the budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clex_train.evaluation.retrieval.haystack import Documents
from clex_train.utils.protocols import Tokenizer

FIRST_PROBE = 16
"""Units of filler from which the tokens of a unit are estimated."""
BISECT_EVERY = 4
"""Rounds of interpolation between two of bisection, which bounds their number for uneven filler."""


@dataclass(frozen=True)
class Ask:
    """What a task is asked to make a prompt of; equal generators give equal prompts."""

    rng: np.random.Generator
    length: int
    """Tokens of prompt and answer together, at most."""
    depth: float = 0.0
    """Where the answer stands, from 0 (start) to 1 (end), for tasks that are asked by depth."""
    source: Documents | None = None

    @property
    def documents(self) -> Documents:
        """Real text; tasks that need none are asked without."""
        assert self.source is not None, "this task needs real text"
        return self.source


@dataclass(frozen=True)
class Draft:
    """A prompt whose filler has not been laid yet."""

    answers: tuple[str, ...]
    """What the generation is compared with."""
    text: Callable[[int], str]
    """The prompt with so many units of filler (0 or more); longer for more units."""
    lead: str = ""
    """How the answer begins: the end of every text, which in a chat is the assistant's."""


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and what it should answer."""

    ids: list[int]
    answers: tuple[str, ...]


def join(separator: str, *parts: str) -> str:
    """The parts that are not empty."""
    return separator.join(part for part in parts if part)


def encode(tokenizer: Tokenizer, text: str, bos: bool | None = None) -> list[int]:
    """The ids of a prompt without a closing EOS; with BOS or without it, by default as the tokenizer does."""
    ids = list(tokenizer.encode(text, verbose=False))
    if ids and ids[-1] == tokenizer.eos_token_id:
        del ids[-1]
    bos_id = tokenizer.bos_token_id
    has_bos = bos_id is not None and ids[:1] == [bos_id]
    if bos is None or bos == has_bos:
        return ids
    if not bos:
        return ids[1:]
    assert bos_id is not None, "`evaluation_bos_id` refuses BOS without a BOS token"
    return [bos_id, *ids]


def encode_in_chat(tokenizer: Tokenizer, text: str, lead: str) -> list[int]:
    """Encode a user's turn and the beginning `lead` of the answer to it by the tokenizer's chat template.

    The template puts BOS and every other special token.
    """
    assert text.endswith(lead), "a prompt ends with the beginning of its answer"
    turn = [{"role": "user", "content": text.removesuffix(lead).rstrip()}]
    written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + lead
    return list(tokenizer.encode(written, add_special_tokens=False, verbose=False))


def answer_len(tokenizer: Tokenizer, answers: tuple[str, ...]) -> int:
    """Tokens to generate for `answers`: those of writing them as a list, a quarter more, and four."""
    written = tokenizer.encode(" " + ", ".join(answers), add_special_tokens=False, verbose=False)
    return len(written) + len(written) // 4 + 4


def frame_len(tokenizer: Tokenizer, draft: Draft, bos: bool | None = None, in_chat: bool = False) -> int:
    """Count the tokens of the prompt without any filler."""
    return len(_encode(tokenizer, draft, 0, bos, in_chat))


def fit(tokenizer: Tokenizer, draft: Draft, budget: int, bos: bool | None = None, in_chat: bool = False) -> Prompt:
    """Fit the most filler into `budget` tokens; `ValueError` when the frame of the prompt alone has more."""
    low, best = 0, _encode(tokenizer, draft, 0, bos, in_chat)
    if len(best) > budget:
        raise ValueError(f"budget={budget}: the prompt without filler has {len(best)} tokens")
    above: tuple[int, int] | None = None
    units, rounds = FIRST_PROBE, 0
    while above is None or above[0] - low > 1:
        ids = _encode(tokenizer, draft, units, bos, in_chat)
        before = (low, len(best))
        if len(ids) <= budget:
            low, best = units, ids
        else:
            above = (units, len(ids))
        rounds += 1
        units = _next(low, len(best), above, before, budget, rounds)
    return Prompt(best, draft.answers)


def _encode(tokenizer: Tokenizer, draft: Draft, units: int, bos: bool | None, in_chat: bool) -> list[int]:
    text = draft.text(units)
    return encode_in_chat(tokenizer, text, draft.lead) if in_chat else encode(tokenizer, text, bos)


def _next(
    low: int, low_cost: int, above: tuple[int, int] | None, before: tuple[int, int], budget: int, rounds: int
) -> int:
    """Units to try: where the line through two measured points meets the budget, now and then the middle."""
    if above is None:
        rate = max((low_cost - before[1]) / (low - before[0]), 0.25)
        return low + max(1, int((budget - low_cost) / rate))
    high, high_cost = above
    if rounds % BISECT_EVERY == 0:
        return (low + high) // 2
    crossing = low + int((budget - low_cost) * (high - low) / (high_cost - low_cost))
    return min(max(crossing, low + 1), high - 1)
