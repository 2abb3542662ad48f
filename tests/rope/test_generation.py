"""`generate` with a cache across L gives the tokens of forwards without one, in every family."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.frequency_table import FrequencyTable
from tests.rope.rotary_families import CONTEXT, FAMILIES, tiny_model, tokens

PROMPT, COUNT = CONTEXT - 4, 12


def scaled_model(family: str) -> tuple[PreTrainedModel, RotaryHandle]:
    """Return a model whose frequencies change strongly at L."""
    model = tiny_model(family)
    handle = install_rotary(model, CONTEXT)
    base = handle.base_inv_freq
    grid = torch.tensor([1.0, 4.0], dtype=torch.float64)
    handle.use(FrequencyTable(grid, torch.stack([base, base / torch.linspace(2, 9, len(base))]), "clex", CONTEXT))
    return model, handle


@torch.no_grad()
def without_cache(model: PreTrainedModel, ids: Tensor) -> Tensor:
    for _ in range(COUNT):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_equals_forwards_without_across_l(family: str) -> None:
    model, handle = scaled_model(family)
    prompt = tokens(2, PROMPT)
    # At one t: with a moving one, keys of deeper layers depend on when they were computed.
    with handle.pinned(4.0):
        found = model.generate(prompt, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        assert torch.equal(found, without_cache(model, prompt))


def test_the_cache_is_kept_and_undo_restores_the_model() -> None:
    model, handle = scaled_model("phi3")
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    copied = copy.deepcopy(model)
    model.generate(tokens(2, PROMPT), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    assert lengths == [PROMPT] + [1] * (COUNT - 1), "no token is computed again"
    assert copied.prepare_inputs_for_generation.__self__ is copied
    handle.undo()
    assert "prepare_inputs_for_generation" not in vars(model)
