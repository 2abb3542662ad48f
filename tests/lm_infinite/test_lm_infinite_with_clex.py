"""The lambda mask combined with a frequency table, in either order of installation."""

import math

import pytest
import torch

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.rope.patch import install_rotary
from clex_train.scaling.methods.pi import pi_table
from clex_train.scaling.spectrum import Spectrum
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens


def linear_scaling(factor: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}}


@pytest.mark.parametrize("rotary_first", [True, False])
def test_the_mask_uses_the_current_frequencies(rotary_first):
    """Compare position interpolation from a table with transformers' linear scaling, under the mask."""
    ids, logits = tokens(1, 70), []
    for model in (tiny_model("llama"), tiny_model("llama", **linear_scaling(2.0))):
        is_scaled_by_table = not logits
        if is_scaled_by_table and not rotary_first:
            apply_lm_infinite(model, 2 * CONTEXT, 4)
        if is_scaled_by_table:
            handle = install_rotary(model, CONTEXT)
            handle.use(pi_table(handle.base_inv_freq, torch.tensor([1.0, 2.0], dtype=torch.float64)))
        if rotary_first or not is_scaled_by_table:
            apply_lm_infinite(model, 2 * CONTEXT, 4)
        with torch.no_grad():
            if is_scaled_by_table:
                with handle.pinned(1.0):
                    unscaled = model(ids).logits
                with handle.pinned(2.0):
                    logits.append(model(ids).logits)
            else:
                logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (unscaled - logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("constant", [True, False])
def test_a_cache_works_while_t_is_constant_and_is_refused_when_t_moves(constant):
    model, ids = tiny_model("llama"), tokens(1, 40)
    handle = install_rotary(model, CONTEXT)
    handle.use(pi_table(handle.base_inv_freq, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)))
    lambda_handle = apply_lm_infinite(model, CONTEXT, 4)
    cache = lambda_handle.new_cache() if constant else None
    with torch.no_grad(), handle.pinned(2.0):
        whole = model(ids).logits
        first = model(ids[:, :30], past_key_values=cache, use_cache=True)
        rest = model(ids[:, 30:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), whole, rtol=0, atol=1e-5)
    with torch.no_grad(), handle.pinned(4.0), pytest.raises(ValueError, match="pin"):
        model(ids[:, :1], past_key_values=first.past_key_values, use_cache=True)


def test_gradients_reach_the_frequencies():
    model, ids = tiny_model("llama").train(), tokens(2, 40)
    handle = install_rotary(model, CONTEXT)
    apply_lm_infinite(model, CONTEXT, 4, block_len=16)
    inv_freq = handle.base_inv_freq.requires_grad_()
    with handle.training(Spectrum(inv_freq)):
        model(ids, labels=ids).loss.backward()
    assert inv_freq.grad.abs().min() > 0


def test_log_scaling_counts_the_keys_visible_under_the_mask():
    model, ids = tiny_model("llama"), tokens(1, 100)
    handle = install_rotary(model, CONTEXT)
    install_log_scaling(model, "always", CONTEXT, handle.on_length)
    scales = []

    def call() -> None:
        with torch.no_grad():
            model(ids)
        scales.append({module.scaling * 12**0.5 for module in model.modules() if hasattr(module, "scaling")})

    call()
    mask = apply_lm_infinite(model, 2 * CONTEXT, 4)
    call()
    mask.undo()
    call()
    log_of_context = math.log(CONTEXT)
    expected = [math.log(seen) / log_of_context for seen in (100, 2 * CONTEXT + 4, 100)]
    assert [min(each) for each in scales] == [max(each) for each in scales] == pytest.approx(expected)


@torch.no_grad()
def test_log_scaling_by_token_counts_at_most_window_and_start_with_any_cache():
    """Compare with factors on the output of q_proj, under the mask: in one forward, in chunks, token by token."""
    model, ids = tiny_model("llama").double(), tokens(2, 70)
    handle = install_rotary(model, CONTEXT)
    lambda_handle = apply_lm_infinite(model, 2 * CONTEXT, 4)
    plain = model(ids).logits
    counts = torch.arange(1, 71, dtype=torch.float64).clamp(max=2 * CONTEXT + 4)
    factors = (counts.log() / math.log(CONTEXT)).clamp(min=1)[None, :, None]
    projections = [module.q_proj for module in model.modules() if hasattr(module, "q_proj")]
    hooks = [each.register_forward_hook(lambda _module, _args, output: output * factors) for each in projections]
    expected = model(ids).logits
    for hook in hooks:
        hook.remove()
    install_log_scaling(model, "token_eval", CONTEXT, handle.on_length, handle.on_call)
    found = model(ids).logits
    assert (found - expected).abs().max() < 1e-6 < 1e-3 < (found - plain).abs().max()
    for cache in (None, lambda_handle.new_cache()):
        pieces = []
        for piece in ids.split([20, 30, 1, 1, 18], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        assert (torch.cat(pieces, dim=1) - found).abs().max() < 1e-6


def test_sampled_positions_are_refused():
    model, ids = tiny_model("llama"), tokens(1, 8)
    handle = install_rotary(model, CONTEXT)
    apply_lm_infinite(model, CONTEXT, 4)
    positions = torch.arange(8, dtype=torch.float64)[None] * 1.5
    with (
        handle.training(Spectrum(handle.base_inv_freq), positions),
        pytest.raises(ValueError, match="sampled positions"),
    ):
        model(ids, use_cache=False)
