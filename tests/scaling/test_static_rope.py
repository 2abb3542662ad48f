"""Learned static RoPE: its frequencies, its start, its guard, and the config that states it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.rope import recipes
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling import methods
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.solver import UnstableField
from clex_train.scaling.static_rope import RampRope, StaticRope
from tests.helpers.composing import composed

L = 128
CONFIG = LlamaConfig(
    hidden_size=64,
    num_attention_heads=2,
    num_hidden_layers=1,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=L,
)
BASE = 10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)


def scaled(**options):
    scaling = ScalingConfig(name=Method.static, options=options)
    arch = recipes.scaled(CONFIG, scaling, 16.0, L)
    return arch, recipes.spectrum_at(native_handle_on_meta(arch, L), 16.0)


def test_frequencies_are_the_start_times_the_exponential_and_the_gradient_theirs() -> None:
    rope = StaticRope(BASE, 16.0)
    assert torch.equal(rope.inv_freq(16.0), BASE)
    with torch.no_grad():
        rope.alpha.copy_(torch.linspace(-1, 1, 16))
    theta = rope.inv_freq(1.0)
    torch.testing.assert_close(theta, BASE * torch.linspace(-1, 1, 16).double().exp())
    theta.log().sum().backward()
    torch.testing.assert_close(rope.alpha.grad, torch.ones(16))
    table = rope.table([1.0, 2.0, 16.0])
    assert all(torch.equal(table.at(t).inv_freq, theta.detach()) for t in (1.0, 2.0, 16.0))
    assert table.digest != StaticRope(BASE, 16.0).digest()


def test_the_start_is_the_formula_at_the_factor() -> None:
    _, yarn = scaled()
    stock = recipes.scaled(CONFIG, ScalingConfig(name=Method.yarn), 16.0, L)
    expected = native_handle_on_meta(stock, L).base_inv_freq
    torch.testing.assert_close(yarn.inv_freq, expected, rtol=2e-6, atol=0)
    _, ntk = scaled(start="ntk")
    torch.testing.assert_close(ntk.inv_freq, ntk_table(BASE, [1.0, 16.0]).inv_freq[1], rtol=2e-6, atol=0)
    arch, none = scaled(start="none", attention_factor=1.2)
    torch.testing.assert_close(none.inv_freq, BASE, rtol=1e-6, atol=0)
    # The factor on cos and sin belongs to the architecture, so the spectrum has none in addition.
    assert none.attention_factor == 1.0
    assert arch.rope_parameters["attention_factor"] == 1.2


def test_a_stock_model_has_the_learned_frequencies() -> None:
    arch, start = scaled()
    alpha = torch.linspace(-0.5, 0.5, 16)
    stated = recipes.with_learned(arch, alpha)
    model = AutoModelForCausalLM.from_config(stated)
    expected = start.inv_freq * alpha.double().exp()
    for length in (L, 16 * L):
        model(torch.ones(1, length, dtype=torch.long))
        torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0)
    assert stated.max_position_embeddings == 16 * L
    assert arch.rope_parameters["long_factor"] != stated.rope_parameters["long_factor"]


def ramp(**options) -> RampRope:
    scaling = ScalingConfig(name=Method.static, options={"learn": "ramp"} | options)
    arch = recipes.scaled(CONFIG, scaling, 16.0, L)
    handle = native_handle_on_meta(arch, L)
    return recipes.learned_module(scaling, handle, recipes.spectrum_at(handle, 16.0))


def test_a_learned_ramp_starts_at_yarn_s_and_moves_by_its_two_ends() -> None:
    rope = ramp()
    torch.testing.assert_close(rope.inv_freq(16.0), scaled()[1].inv_freq, rtol=2e-6, atol=0)
    assert [weight.shape for weight in rope.parameters()] == [torch.Size([2])]
    with torch.no_grad():
        rope.alpha.copy_(torch.tensor([0.1, 0.2]))
    first, last = rope.ends.tolist()
    share = ((torch.arange(16) - first - 0.4) / (last - first + 0.4)).clamp(0, 1).double()
    torch.testing.assert_close(rope.inv_freq(1.0), BASE * (1 - share + share / 16), rtol=1e-6, atol=0)
    rope.inv_freq(1.0).log().sum().backward()
    assert (rope.alpha.grad != 0).all()
    with torch.no_grad():
        rope.alpha.copy_(torch.tensor([3.0, -3.0]))
    assert bool(torch.isfinite(rope.inv_freq(1.0)).all()), "the ends have crossed"


@pytest.mark.parametrize("value", [5.0, float("nan"), 1000.0])
def test_factors_beyond_the_guard_stop_the_run(value: float) -> None:
    rope = StaticRope(BASE, 16.0)
    with torch.no_grad():
        rope.alpha[3] = value
    with pytest.raises(UnstableField, match=r"scaling\.max_residual=4"):
        rope.check_residual(4.0)
    if value != 5.0:
        with pytest.raises(UnstableField, match=r"theta\[3\]"):
            rope.inv_freq(16.0)


def test_the_method_evaluates_nothing_and_knows_its_options() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.methods=static"):
        composed("+experiment=tiny_base", "evaluation.methods=[static]", "dry_run=true")
    for key, value in (("start", "fast"), ("other", 1)):
        with pytest.raises(ValueError, match=rf"scaling\.options\.{key}"):
            methods.for_training(ScalingConfig(name=Method.static, options={key: value}))
    with pytest.raises(ValueError, match=r"scaling\.options\.attention_factor"):
        scaled(attention_factor=0.0)
    with pytest.raises(ValueError, match=r"scaling\.options\.start=ntk"):
        ramp(start="ntk")
