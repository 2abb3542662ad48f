"""Llamas with known answers: one continues from the latest match in its context, one has all answers stored."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT_LEN = 128


class CopyingLlama(LlamaForCausalLM):
    """Run the layers, so that cache and frequencies are real, then predict the token after the longest earlier match.

    The tokens read so far are stored in the cache, so a decoding loop that loses the cache loses the answer. `shift`
    is added to each predicted id: any value but 0 gives wrong answers. A prompt must be read from its beginning.
    """

    shift = 0

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        cache = output.past_key_values
        seen = [*getattr(cache, "seen", []), *input_ids[0].tolist()]
        if cache is not None:
            cache.seen = seen
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, -1, (self.next_token(seen) + self.shift) % self.config.vocab_size] = 1
        return output

    def next_token(self, seen: list[int]) -> int:
        """Return the next token after `seen`."""
        return continuation(seen)


class AnsweringLlama(CopyingLlama):
    """Answer each prompt with the stored tokens of its answer, then end the text."""

    answers: dict[tuple[int, ...], list[int]]
    end = 0

    def next_token(self, seen: list[int]) -> int:
        for prompt, answer in self.answers.items():
            if tuple(seen[: len(prompt)]) == prompt:
                return ([*answer, self.end, *seen])[len(seen) - len(prompt)]
        return self.end


def continuation(seen: list[int]) -> int:
    """Return the token after the latest earlier match of the longest suffix of `seen` (at most 24 tokens)."""
    for length in range(min(24, len(seen) - 1), 0, -1):
        suffix = seen[-length:]
        for start in range(len(seen) - length - 1, -1, -1):
            if seen[start : start + length] == suffix:
                return seen[start + length]
    return 0


def build(vocab_size: int, shift: int = 0, make: type[CopyingLlama] = CopyingLlama) -> CopyingLlama:
    """Build a small model with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LEN,
    )
    torch.manual_seed(0)
    model = make(config)
    model.shift = shift
    return model
