"""EVQ-Cosh: the closed form, its limits, and the stock config that states it."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling import methods
from clex_train.scaling.methods.evq import Evq

L, P = 128, 16
CONFIG = LlamaConfig(
    hidden_size=64,
    num_attention_heads=2,
    num_hidden_layers=1,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=L,
)


def table(**options):
    rope = base_rope(native_handle_on_meta(CONFIG, L))
    return rope, Evq(**options).table(rope, [1.0, 16.0])


def test_frequencies_are_the_closed_form() -> None:
    _, made = table()
    tau = 32 / math.sqrt(L)
    for j in range(P):
        phi = 1 - math.asinh((1 - j / P) * math.sinh(tau)) / tau
        assert made.at(16.0).inv_freq[j].item() == pytest.approx(10000.0**-phi, rel=1e-12)
    assert torch.equal(made.at(1.0).inv_freq, made.at(16.0).inv_freq)


def test_a_small_tau_is_plain_rope_and_a_large_one_keeps_the_fastest_pair() -> None:
    rope, plain = table(tau=1e-4)
    torch.testing.assert_close(plain.inv_freq[0], rope.inv_freq, rtol=1e-6, atol=0)
    _, strong = table(tau=5.0)
    assert strong.inv_freq[0, 0] == pytest.approx(1.0)
    gaps = strong.inv_freq[0].log().diff()
    assert bool((gaps.diff() < 0).all()), "the gaps widen towards the slow pairs"


def test_a_stock_model_has_them_at_every_length() -> None:
    arch = recipes.scaled(CONFIG, ScalingConfig(name=Method.evq), 16.0, L)
    model, (_, made) = AutoModelForCausalLM.from_config(arch), table()
    for length in (L, 16 * L):
        model(torch.ones(1, length, dtype=torch.long))
        torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), made.inv_freq[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.0, -1.0, 31.0])
def test_a_tau_out_of_range_is_named(tau: float) -> None:
    with pytest.raises(ValueError, match=r"scaling\.options\.tau"):
        recipes.scaled(CONFIG, ScalingConfig(name=Method.evq, options={"tau": tau}), 16.0, L)
    assert methods.for_training(ScalingConfig(name=Method.evq)).label == "EVQ-Cosh"
