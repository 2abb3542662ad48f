"""Prompts that are too long: cut in the middle, half from each end, as the authors of LongBench do it, and counted.

Their pred.py encodes the prompt before any chat template, decodes its first and its last half, and joins the two
texts. The middle has the least instructions. The harness itself drops the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

Message = dict[str, str]


class Truncation(Enum):
    left = "left"
    """Drop the beginning, the harness's own way."""
    middle = "middle"


def cut_middle(
    text: str, room: int, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> str:
    """Return the first and the last `room // 2` tokens of a text as text, or the text itself if it fits.

    `room` is at least 2, and counts the special tokens that `encode` adds; `decode` leaves them out.
    """
    tokens = encode(text)
    if len(tokens) <= room:
        return text
    half = room // 2
    return decode(tokens[:half]) + decode(tokens[-half:])


class Shortener:
    """Shortens the prompts of a task, and counts them.

    Args:
        encode: text -> ids, with the special tokens of a prompt.
        decode: ids -> text, without special tokens.
        max_length: most tokens of prompt and answer.
        max_prompt: most tokens of the prompt, before a chat template; None for what the answer leaves.
        truncation: the end that longer prompts lose, or their middle.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        max_length: int,
        max_prompt: int | None,
        truncation: Truncation,
    ) -> None:
        self._encode, self._decode, self._truncation = encode, decode, truncation
        self._max_length, self._max_prompt = max_length, max_prompt
        self.shortened: set[Any] = set()
        """Documents whose prompts lost tokens."""

    def fit(self, document: Any, text: str, answer_len: int, around: int = 0) -> str:
        """Return the prompt with room for `answer_len` tokens of answer and `around` tokens of a chat template."""
        longest = self._max_length - answer_len - around
        room = longest if self._max_prompt is None else min(longest, self._max_prompt)
        if len(self._encode(text)) <= room:
            return text
        self.shortened.add(document)
        if self._truncation is Truncation.left:
            # The harness cuts the ids.
            return text
        found = cut_middle(text, room, self._encode, self._decode)
        # Encoding the joined halves can give more tokens at the seam, and the harness would drop the first ones.
        while len(self._encode(found)) > longest and room > 2:
            room -= 1
            found = cut_middle(text, room, self._encode, self._decode)
        return found

    def fit_chat(self, messages: list[Message], answer_len: int, render: Callable[[list[Message]], str]) -> str:
        """Render a conversation whose last question is shortened so that the whole fits."""
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if asked is None:
            return render(messages)

        def with_question(text: str) -> str:
            return render([m | {"content": text} if i == asked else m for i, m in enumerate(messages)])

        # Everything but the question: template, system message, examples.
        around = len(self._encode(with_question("")))
        content = messages[asked]["content"]
        return with_question(self.fit(content, content, answer_len, around))
