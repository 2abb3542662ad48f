"""Every family: untouched at t = 1, gradients into the frequencies, cached keys that follow t, undone to the bit."""

import pytest
import torch
from rotary_families import CONTEXT, FAMILIES, tiny_model, tokens
from unrotated_cache import reference_logits

from clex_train.rope.patch import install_rotary
from clex_train.scaling.baselines import ntk_table
from clex_train.scaling.spectrum import Spectrum

GRID = [1.0, 2.0, 3.0, 4.0, 5.0]
PIECES = [10, 6, 1, 1, 15, 1, 14, 1]  # t moves with the third, the fifth and the last
INTERLEAVED = {"cohere"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_within_l_the_logits_are_those_of_the_untouched_model(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, CONTEXT)
    before = model(ids).logits
    handle = install_rotary(model, CONTEXT)
    plain = model(ids).logits
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    at_one = model(ids).logits
    assert torch.allclose(plain, before, atol=1e-5, rtol=0)
    assert torch.allclose(at_one, before, atol=1e-5, rtol=0)


def test_gradients_reach_every_scaled_frequency(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, CONTEXT)
    handle = install_rotary(model, CONTEXT)
    theta = handle.base_inv_freq.requires_grad_()
    with handle.training(Spectrum(theta, 2.0), 2.0 * torch.arange(CONTEXT).double().expand(2, -1)):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert theta.grad is not None
    assert bool((theta.grad.abs() > 0).all())


@torch.no_grad()
def test_cached_keys_follow_t_over_three_crossings(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, sum(PIECES))
    handle = install_rotary(model, CONTEXT)
    table = ntk_table(handle.base_inv_freq, GRID)
    handle.use(table)
    cache, found, start = None, [], 0
    for length in PIECES:
        output = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + length
        found.append(output.logits)
    handle.undo()
    expected = reference_logits(model, ids, PIECES, table, CONTEXT, interleaved=family in INTERLEAVED)
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_undo_restores_the_logits_to_the_bit(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 2 * CONTEXT)
    before, modules = model(ids).logits, dict(model.named_modules())
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    assert not torch.equal(model(ids).logits, before)
    handle.undo()
    assert torch.equal(model(ids).logits, before)
    assert dict(model.named_modules()) == modules
