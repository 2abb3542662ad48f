"""The answer as it comes, on standard output, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from clex_train.console.program import echo
from clex_train.utils.protocols import Tokenizer


class Stream(TextStreamer):  # type: ignore[misc]  # transformers is not followed
    """Prints each part of a text once it is final, and takes the times of its tokens."""

    def __init__(self, tokenizer: Tokenizer, num_prompt: int, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        """Generated tokens."""
        self._num_prompt, self._clock = num_prompt, clock
        self._begin: float | None = None
        self._first = self._last = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token, which has been copied to the host: the device has finished it."""
        if self._begin is None:
            self._begin = self._clock()
        else:
            self._last = self._clock()
            self._first = self._first or self._last
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that later tokens do not change."""
        if text or stream_end:
            echo(text, end="\n" if stream_end else "")

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
