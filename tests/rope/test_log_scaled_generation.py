"""Log-scaling bound to a rotary handle: n follows the cache in decoding and the row in training."""

import math

import pytest
import torch

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.rope.patch import install_rotary
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens


@torch.no_grad()
def test_each_decoding_step_uses_the_factor_of_its_length() -> None:
    model, ids = tiny_model("llama", num_layers=1), tokens(1, 40)
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    scaling = install_log_scaling(model, "always", CONTEXT, handle.on_length)
    output = model(ids[:, :20], use_cache=True)
    for n in range(21, 41):
        output = model(ids[:, n - 1 : n], past_key_values=output.past_key_values)
        assert scaling.factor == pytest.approx(math.log(n) / math.log(CONTEXT))
    assert torch.allclose(output.logits[:, -1], model(ids).logits[:, -1], atol=1e-5)


def log_scaled_decoding(attention: str) -> torch.Tensor:
    """Return the logits of a prompt of 30 tokens and four single ones after it, with t and the factor moving."""
    model, ids = tiny_model("llama", hidden_size=64, head_dim=16), tokens(1, 34)
    model.set_attn_implementation(attention)
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    install_log_scaling(model, "always", CONTEXT, handle.on_length)
    logits, cache = [], None
    with torch.no_grad():
        for piece in ids.split([30, 1, 1, 1, 1], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "attention", ["eager", pytest.param("flex_attention", marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_every_attention_back_end_scales_alike_while_decoding(attention: str) -> None:
    # flex_attention compiles its kernels, which takes a minute.
    assert torch.allclose(log_scaled_decoding(attention), log_scaled_decoding("sdpa"), atol=1e-5, rtol=0)


def test_the_factor_of_a_training_row_follows_its_tokens_and_not_its_span() -> None:
    model, ids = tiny_model("llama").train(), tokens(1, 2 * CONTEXT)
    handle = install_rotary(model, CONTEXT)
    scaling = install_log_scaling(model, "always", CONTEXT, handle.on_length)
    with handle.training(Spectrum(handle.base_inv_freq, 8.0), 4.0 * torch.arange(2 * CONTEXT).double()[None]):
        model(ids, use_cache=False)
    assert scaling.factor == pytest.approx(math.log(2 * CONTEXT) / math.log(CONTEXT))


@torch.no_grad()
def test_a_pinned_length_pins_the_factor_too() -> None:
    model, ids = tiny_model("llama"), tokens(1, 40)
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    install_log_scaling(model, "eval", CONTEXT, handle.on_length)
    whole = model(ids).logits
    with handle.fixed(40):
        output = model(ids[:, :15], use_cache=True)
        rest = model(ids[:, 15:], past_key_values=output.past_key_values).logits
    assert torch.allclose(torch.cat((output.logits, rest), dim=1), whole, atol=1e-5)
