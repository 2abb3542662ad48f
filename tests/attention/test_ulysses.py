"""Ulysses attention of packed documents without a mask, against each document alone; the patch is undone on exit."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clex_train.attention import ulysses
from clex_train.attention.ulysses import UlyssesAttention
from clex_train.models.memory_options import recompute_layers
from tests.attention import varlen
from tests.rope.rotary_families import tiny_model, tokens

LAYOUTS = ([5, 1, 10], [1, 1, 14], [16], [9, 7])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LAYOUTS])
FAMILIES = ("llama", "gpt_neox", "mixtral", "qwen3", "olmo2")
WEIGHTS = torch.linspace(-1, 1, 61)


def alone(attention):
    """Build the all-to-all of a group of one rank; it sets the attributes that DeepSpeed sets."""

    def exchange(module, query, key, value, mask, **options):
        assert options["position_ids"].numel() == 1
        output, weights = attention(module, query, key, value, mask, **options)
        module.num_key_value_groups = 77
        return output.flatten(2), weights

    return exchange


def logits_and_gradients(model, **arguments):
    logits = model(input_ids=tokens(4, 16), position_ids=POSITIONS, use_cache=False, **arguments).logits
    gradients = torch.autograd.grad((logits * WEIGHTS).sum(), [p for p in model.parameters() if p.requires_grad])
    return logits.detach(), gradients


def assert_same(one, other):
    assert torch.allclose(one[0], other[0], atol=1e-5)
    for first, second in zip(one[1], other[1], strict=True):
        assert (first - second).abs().max() <= 1e-5 * (1 + second.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_documents_are_isolated_as_by_the_mask_of_transformers(family, recomputed):
    model = tiny_model(family).train()
    expected = logits_and_gradients(model)
    if recomputed:
        recompute_layers(model)
    with UlyssesAttention(model, alone).active(POSITIONS):
        assert_same(logits_and_gradients(model), expected)
    with UlyssesAttention(model, alone).active(None):
        joined = logits_and_gradients(model)
    assert (joined[0] - expected[0]).abs().max() > 1e-3, "documents that are not apart give something else"


def test_flash_attention_receives_the_document_lengths(monkeypatch):
    monkeypatch.setitem(ulysses.DOCUMENT_ATTENTION, varlen.NAME, UlyssesAttention._attend_varlen)
    model = tiny_model("llama")
    expected = logits_and_gradients(model)
    model.set_attn_implementation(varlen.NAME)
    with UlyssesAttention(model, alone).active(POSITIONS):
        assert_same(logits_and_gradients(model), expected)


def test_attention_is_unchanged_outside_the_context():
    model, other = tiny_model("llama"), tiny_model("llama")
    names = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
    before, sdpa = logits_and_gradients(model), ALL_ATTENTION_FUNCTIONS["sdpa"]
    rows = UlyssesAttention(model, alone)
    with rows.active(POSITIONS):
        logits_and_gradients(model)
        assert_same(logits_and_gradients(other), before)
    with pytest.raises(IndexError), rows.active(POSITIONS):
        model(input_ids=tokens(4, 16) + 61, use_cache=False)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert {module.num_key_value_groups for module in names} == {2}
    assert model.config._attn_implementation == "sdpa"
    after = logits_and_gradients(model)
    assert torch.equal(after[0], before[0])
    assert all(map(torch.equal, after[1], before[1]))
