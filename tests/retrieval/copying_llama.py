"""A Llama that answers by looking back: after what stood before the last tokens' like, it says what stood there."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT_LEN = 128


class CopyingLlama(LlamaForCausalLM):
    """Runs its layers, so that cache and frequencies are real, and then predicts the continuation of the latest place
    in the text that ends with as many of the last tokens as possible.

    What was read travels in the cache: a decoding loop that loses it loses the answer. `shift` is added to each
    predicted id, so that another number than 0 gives wrong answers. A prompt is read from its beginning.
    """

    shift = 0

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        cache = output.past_key_values
        seen = [*getattr(cache, "seen", []), *input_ids[0].tolist()]
        if cache is not None:
            cache.seen = seen
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, -1, (self.say(seen) + self.shift) % self.config.vocab_size] = 1
        return output

    def say(self, seen: list[int]) -> int:
        """The token after those that were seen."""
        return continuation(seen)


class KnowingLlama(CopyingLlama):
    """Has been told the answer (its tokens) to each prompt, and ends the text behind it."""

    answers: dict[tuple[int, ...], list[int]]
    end = 0

    def say(self, seen: list[int]) -> int:
        for prompt, answer in self.answers.items():
            if tuple(seen[: len(prompt)]) == prompt:
                return ([*answer, self.end, *seen])[len(seen) - len(prompt)]
        return self.end


def continuation(seen: list[int]) -> int:
    """The token after the latest earlier place that shares the longest run of last tokens (at most 24)."""
    for length in range(min(24, len(seen) - 1), 0, -1):
        suffix = seen[-length:]
        for start in range(len(seen) - length - 1, -1, -1):
            if seen[start : start + length] == suffix:
                return seen[start + length]
    return 0


def build(vocab_size: int, shift: int = 0, make: type[CopyingLlama] = CopyingLlama) -> CopyingLlama:
    """Two small layers with random weights."""
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
