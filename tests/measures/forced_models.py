"""Models whose every probability is known, and small cells of forced prompts."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.measures import Measure
from clex_train.measures.plan import Cell, build_cells
from clex_train.token_store.store import TokenStore
from tests.retrieval.copying_llama import CopyingLlama, continuation
from tests.retrieval.text_stores import write_text_store

LOGIT = 9.0
"""Logit of the token that the model expects; all others have 0."""
LAST = 16
"""Positions of a chunk, from its end, at which the model expects anything."""
TEXT = "It rained all night. In the morning the river had risen, and nobody crossed the bridge. "
STORY = "".join(f"On day {i} we walked {i * 7} miles and saw {i % 9} birds. Was it late? " + TEXT for i in range(60))


class ForcedLlama(CopyingLlama):
    """Give the token after the longest earlier match the logit 9 at every scored position of every row."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = LlamaForCausalLM.forward(self, input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        cache = output.past_key_values
        seen = getattr(cache, "seen", [[] for _ in input_ids])
        output.logits = torch.zeros_like(output.logits)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(max(0, len(ids) - LAST), len(ids)):
                expected = (continuation([*seen[row], *ids[: place + 1]]) + self.shift) % self.config.vocab_size
                output.logits[row, place, expected] = LOGIT
        if cache is not None:
            cache.seen = [[*before, *ids] for before, ids in zip(seen, input_ids.tolist(), strict=True)]
        return output


def expected_nll(row: list[int], count: int, vocab_size: int) -> float:
    """Sum the nll of the last `count` tokens of a row under `ForcedLlama`."""
    total = math.log(math.exp(LOGIT) + vocab_size - 1)
    starts = range(len(row) - count, len(row))
    return sum(total - LOGIT * (continuation(row[:start]) == row[start]) for start in starts)


def text_store(tokenizer: Any, folder: Path) -> TokenStore:
    """Write two held-out documents."""
    write_text_store(folder, [STORY, STORY[3000:]], tokenizer)
    return TokenStore(folder).split("validation")


def make_cells(
    tokenizer: Any, store: TokenStore, *measures: Measure, seed: int = 0, bos_id: int | None = None, **settings: Any
) -> list[Cell]:
    """Make the cells of measures at 160 and 320 tokens, at two depths, with three prompts each."""
    known = {"task_lengths": [160, 320], "depths": [0.0, 0.5], "num_prompts": 3}
    spec = EvaluationConfig(measures=list(measures), **{**known, **settings})
    return build_cells(spec, tokenizer, store, seed, bos_id)
