"""The answer as it comes, on standard output, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from clex_train.console.program import echo
from clex_train.utils.protocols import Tokenizer


class Stream(BaseStreamer):  # type: ignore[misc]  # transformers is not followed
    """Prints each token as soon as its text is whole, and takes the times of the tokens.

    `TextStreamer` of transformers holds back symbols until the next space, which code or a row of dots may not have.
    """

    def __init__(self, tokenizer: Tokenizer, num_prompt: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ids: list[int] = []
        """Generated tokens."""
        self._tokenizer, self._num_prompt, self._clock = tokenizer, num_prompt, clock
        self._begin: float | None = None
        self._first = self._last = 0.0
        self._window, self._printed = 0, 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token, which has been copied to the host: the device has finished it."""
        if self._begin is None:
            self._begin = self._clock()
            return
        self._last = self._clock()
        self._first = self._first or self._last
        self.ids += value.flatten().tolist()
        self._print(is_last=False)

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._print(is_last=True)
        echo("")

    def _print(self, is_last: bool) -> None:
        # A token's text depends on the one before it, so both are decoded, and what was printed is cut off. Decoding
        # the whole text each time would take the square of its length.
        before, now = self._decode(self.ids[self._window : self._printed]), self._decode(self.ids[self._window :])
        # A character of several tokens is a replacement character until its last one.
        is_whole = not now.endswith("\ufffd") or is_last
        if len(now) > len(before) and is_whole:
            echo(now[len(before) :], end="")
            self._window, self._printed = self._printed, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        # Without the clean-up of spaces, which changes text that was printed already.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def statistics(self) -> str:
        """Say how many tokens there are, and how fast the prompt was read and they were generated."""
        if not self.ids or self._begin is None:
            return "no token was generated"
        prefill = _rate(self._num_prompt, self._first - self._begin)
        # The first token comes out of the prefill.
        decode = _rate(len(self.ids) - 1, self._last - self._first) if len(self.ids) > 1 else "none"
        return f"{len(self.ids):,} tokens generated; prefill {prefill}, decode {decode}"


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"


def end_tokens(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text: those of the model's generation config, and the tokenizer's EOS."""
    own = model.generation_config.eos_token_id
    ids = [] if own is None else own if isinstance(own, list) else [own]
    # A chat model's tokenizer ends a turn, its config perhaps a document.
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
