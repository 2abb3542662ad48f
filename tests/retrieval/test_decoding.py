"""Greedy decoding, against transformers, with prompts read in any number of chunks."""

import pytest
import torch

from clex_train.config.method import Method
from clex_train.evaluation.decoding import greedy
from clex_train.evaluation.methods import tables
from clex_train.evaluation.perplexity import evaluating
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama

LENGTH, NUM_NEW = 64, 9
PROMPT = torch.randint(1, VOCAB, (LENGTH - NUM_NEW,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_chunks", [1, 2, 7, LENGTH - NUM_NEW])
def test_greedy_decoding_equals_generate(num_chunks: int) -> None:
    model = build_tiny_llama().double()
    handle = install_rotary(model, CONTEXT_LEN)
    handle.use(tables([Method.ntk], base_rope(handle), LENGTH)["ntk"])
    with evaluating(model), handle.fixed(LENGTH):
        ours = greedy(model, PROMPT, NUM_NEW, num_chunks)
        theirs = model.generate(PROMPT[None], do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None)
    assert ours.tolist() == theirs[0, len(PROMPT) :].tolist()
    assert len(set(ours.tolist())) > 2


def test_a_prompt_needs_one_forward_per_chunk_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = build_tiny_llama(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with evaluating(model):
        greedy(model, PROMPT, NUM_NEW, 4)
    assert len(lengths) == 4 + NUM_NEW - 1
    assert sum(lengths) == len(PROMPT) + NUM_NEW - 1
    assert max(lengths) == 14
