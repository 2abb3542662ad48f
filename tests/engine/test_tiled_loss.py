"""Tiled cross-entropy against PyTorch's on all logits, in float64 and bfloat16, and its peak memory."""

import pytest
import torch
from torch import Tensor

from clex_train.engine.tiled_loss import IGNORED, Logits, tiled_cross_entropy
from tests.helpers.largest_tensor import LargestTensor

TOKENS, WIDTH, VOCABULARY = 37, 8, 53
FORMS = [Logits(), Logits(scale=0.25), Logits(softcap=3.0), Logits(scale=2.0, softcap=3.0)]


def inputs(dtype: torch.dtype, tokens: int = TOKENS, width: int = WIDTH, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.arange(tokens) % 3 == 1] = IGNORED
    return [tensor.requires_grad_() for tensor in (hidden, weight, bias)], targets


def reference(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, form: Logits) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).double() * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("tile_len", [1, 5, 36, TOKENS, 1000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_match_those_of_all_logits(tile_len, form, with_bias):
    (hidden, weight, bias), targets = inputs(torch.float64)
    leaves, bias = [hidden, weight, *([bias] if with_bias else [])], bias if with_bias else None
    expected = reference(hidden, targets, weight, bias, form)
    found = tiled_cross_entropy(hidden, targets, weight, bias, tile_len, form)
    # The loss is weighted and scaled by the engine, so its incoming gradient is not 1.
    wanted = torch.autograd.grad(0.37 * expected, leaves)
    given = torch.autograd.grad(0.37 * found, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(tiled_cross_entropy(hidden, targets, weight, bias, tile_len, form), found)


def test_no_scored_token_gives_zero_loss_and_zero_gradient():
    (hidden, weight, bias), targets = inputs(torch.float32)
    loss = tiled_cross_entropy(hidden, torch.full_like(targets, IGNORED), weight, bias, 5, Logits())
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient_and_the_others_are_unchanged(frozen):
    leaves, targets = inputs(torch.float64)
    tiled_cross_entropy(leaves[0], targets, *leaves[1:], 5, Logits()).backward()
    expected = [leaf.grad for leaf in leaves]
    leaves, _ = inputs(torch.float64)
    leaves[frozen].requires_grad_(False)
    tiled_cross_entropy(leaves[0], targets, *leaves[1:], 5, Logits()).backward()
    for index, leaf in enumerate(leaves):
        assert leaf.grad is None if index == frozen else torch.equal(leaf.grad, expected[index])


def test_bfloat16_tiles_are_as_close_to_float64_as_one_product():
    leaves, targets = inputs(torch.bfloat16, tokens=2048, width=32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference(exact[0], targets, *exact[1:], Logits()).backward()
    whole = torch.nn.functional.linear(*leaves).float()
    at_once = torch.autograd.grad(
        torch.nn.functional.cross_entropy(whole, targets, ignore_index=IGNORED, reduction="sum"), leaves
    )
    in_tiles = torch.autograd.grad(tiled_cross_entropy(leaves[0], targets, *leaves[1:], 8, Logits()), leaves)
    for one, other, true in zip(in_tiles, at_once, exact, strict=True):
        distance, allowed = ((gradient.double() - true.grad).norm() for gradient in (one, other))
        assert distance <= 1.05 * allowed


def test_a_hook_on_the_weight_runs_once_with_the_whole_gradient():
    (hidden, weight, _), targets = inputs(torch.float64)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    tiled_cross_entropy(hidden, targets, weight, None, 4, Logits()).backward()
    (wanted,) = torch.autograd.grad(reference(hidden, targets, weight, None, Logits()), weight)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_is_larger_than_a_tile_or_an_input(form):
    (hidden, weight, bias), targets = inputs(torch.float32, tokens=400)
    with LargestTensor() as largest:
        tiled_cross_entropy(hidden, targets, weight, bias, 16, form).backward()
    assert largest.elements == max(16 * VOCABULARY, 400 * WIDTH)
    with LargestTensor() as largest:
        reference(hidden, targets, weight, bias, form).backward()
    assert largest.elements == 400 * VOCABULARY
