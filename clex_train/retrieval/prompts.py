"""Prompts of a given length in tokens.

A task returns a `Draft`: its text as a function of the units of filler (sentences, words, tokens of a document). `fit`
searches for the largest number of units whose text, encoded as a whole, stays within the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clex_train.utils.protocols import Tokenizer

if TYPE_CHECKING:
    from clex_train.retrieval.haystack import Documents

FIRST_PROBE = 16
"""Units of filler of the first attempt, from which the tokens per unit are estimated."""
BISECT_EVERY = 4
"""Bisect instead of interpolating once in this many rounds, which bounds the rounds for uneven filler."""


@dataclass(frozen=True)
class Ask:
    """Input of a task's draft; equal generators give equal prompts."""

    rng: np.random.Generator
    length: int
    """Maximum tokens of prompt and answer together."""
    depth: float = 0.0
    """Position of the answer, from 0 (start) to 1 (end), for tasks with depths."""
    source: Documents | None = None

    @property
    def documents(self) -> Documents:
        """Real text; only for tasks that need it."""
        assert self.source is not None, "this task needs real text"
        return self.source


@dataclass(frozen=True)
class Draft:
    """A prompt with a variable amount of filler."""

    answers: tuple[str, ...]
    """Expected strings."""
    text: Callable[[int], str]
    """Number of units of filler (0 or more) to the prompt's text, which grows with it."""
    lead: str = ""
    """Beginning of the answer, with which every text ends; in a chat it belongs to the assistant."""


@dataclass(frozen=True)
class Prompt:
    """Token ids for the model, and the expected answers."""

    ids: list[int]
    answers: tuple[str, ...]


def join(separator: str, *parts: str) -> str:
    """Join the parts that are not empty."""
    return separator.join(part for part in parts if part)


def encode(tokenizer: Tokenizer, text: str, bos: bool | None = None) -> list[int]:
    """Encode a prompt without a final EOS; `bos` forces BOS or its absence, None follows the tokenizer."""
    # `verbose=False` silences the warning about texts longer than the model's context, which are the point here.
    ids = list(tokenizer.encode(text, verbose=False))
    # Some tokenizers append EOS, after which a model would start a new document.
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
    """Encode a user's turn and the beginning `lead` of its answer with the tokenizer's chat template."""
    assert text.endswith(lead), "a prompt ends with the beginning of its answer"
    turn = [{"role": "user", "content": text.removesuffix(lead).rstrip()}]
    written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + lead
    # The template has added BOS and all other special tokens already.
    return list(tokenizer.encode(written, add_special_tokens=False, verbose=False))


def answer_len(tokenizer: Tokenizer, answers: tuple[str, ...]) -> int:
    """Return the number of tokens to generate for `answers`: those of a list of them, plus a quarter, plus 4."""
    # The margin allows for other separators and spellings.
    written = tokenizer.encode(" " + ", ".join(answers), add_special_tokens=False, verbose=False)
    return len(written) + len(written) // 4 + 4


def frame_len(tokenizer: Tokenizer, draft: Draft, bos: bool | None = None, in_chat: bool = False) -> int:
    """Count the tokens of the prompt without any filler."""
    return len(_encode(tokenizer, draft, 0, bos, in_chat))


def fit(tokenizer: Tokenizer, draft: Draft, budget: int, bos: bool | None = None, in_chat: bool = False) -> Prompt:
    """Build the prompt with the most filler within `budget` tokens. Raises `ValueError` if not even none fits."""
    # Encode the whole text on each attempt: tokens of parts do not add up to those of the whole.
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
    """Choose the next number of units: interpolate between two measured points, and sometimes bisect."""
    if above is None:
        # A lower bound of the rate keeps the first extrapolation from an absurd number of units.
        rate = max((low_cost - before[1]) / (low - before[0]), 0.25)
        return low + max(1, int((budget - low_cost) / rate))
    high, high_cost = above
    if rounds % BISECT_EVERY == 0:
        return (low + high) // 2
    crossing = low + int((budget - low_cost) * (high - low) / (high_cost - low_cost))
    return min(max(crossing, low + 1), high - 1)
