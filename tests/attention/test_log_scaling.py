"""Log-scaling: one factor per call for the attention logits of every layer, with a complete undo."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clex_train.attention.log_scaling import install_log_scaling

L = 16
SIZES = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Lengths:
    """Announce lengths to listeners, as a rotary handle does."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[int], None]] = []

    def on_length(self, listener: Callable[[int], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def announce(self, num_tokens: int) -> None:
        for listener in self.listeners:
            listener(num_tokens)


def small_model(kind: str = "llama", attention: str = "sdpa", **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def scales(model: nn.Module) -> list[float]:
    return [module.scaling for module in model.modules() if hasattr(module, "scaling")]


@pytest.mark.parametrize(
    ("policy", "training", "below", "beyond"),
    [
        ("off", False, 1.0, 1.0),
        ("eval", False, 1.0, math.log(64) / math.log(L)),
        ("eval", True, 1.0, 1.0),
        ("always", False, 1.0, math.log(64) / math.log(L)),
        ("always", True, 1.0, math.log(64) / math.log(L)),
        ("official", False, math.log(4) / math.log(L), math.log(64) / math.log(L)),
        ("official", True, math.log(4) / math.log(L), math.log(64) / math.log(L)),
    ],
)
def test_the_factor_of_each_policy_below_and_beyond_l(policy: str, training: bool, below: float, beyond: float) -> None:
    model, lengths = small_model().train(training), Lengths()
    own = scales(model)
    install_log_scaling(model, policy, L, lengths.on_length)
    for num_tokens, factor in ((4, below), (64, beyond), (4, below), (L, 1.0)):
        lengths.announce(num_tokens)
        assert scales(model) == pytest.approx([scale * factor for scale in own])


def test_the_official_factor_of_one_token_is_zero() -> None:
    model, lengths = small_model(), Lengths()
    install_log_scaling(model, "official", L, lengths.on_length)
    lengths.announce(1)
    assert scales(model) == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_equal_those_of_queries_multiplied_by_the_factor(kind: str, attention: str) -> None:
    model, lengths, ids = small_model(kind, attention), Lengths(), torch.arange(24)[None]
    plain, scaling = model(ids).logits, install_log_scaling(model, "always", L, lengths.on_length)
    lengths.announce(24)
    found = model(ids).logits
    scaling.undo()
    multiply_queries(model, math.log(24) / math.log(L))
    assert not torch.allclose(found, plain, atol=1e-5)
    assert torch.allclose(found, model(ids).logits, atol=1e-6)


def multiply_queries(model: nn.Module, factor: float) -> None:
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            module.weight.mul_(factor)
        if name.endswith("query_key_value"):
            heads = SIZES["num_attention_heads"]
            module.weight.view(heads, 3, -1, module.in_features)[:, 0].mul_(factor)
            module.bias.view(heads, 3, -1)[:, 0].mul_(factor)


def test_undo_restores_every_scale_bitwise_and_stops_listening() -> None:
    model, lengths = small_model("gpt_neox"), Lengths()
    own = scales(model)
    scaling = install_log_scaling(model, "always", L, lengths.on_length)
    lengths.announce(1000)
    scaling.undo()
    assert scales(model) == own
    assert lengths.listeners == []


def test_a_sliding_window_caps_the_number_of_keys_that_count() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = small_model("gemma2", "eager", sliding_window=32, layer_types=kinds, num_key_value_heads=4)
    lengths, own = Lengths(), scales(model)
    install_log_scaling(model, "always", L, lengths.on_length)
    lengths.announce(256)
    assert scales(model) == pytest.approx([own[0] * math.log(32) / math.log(L), own[1] * math.log(256) / math.log(L)])


def test_a_window_of_zero_means_no_window() -> None:
    model, lengths = small_model("qwen2_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16), Lengths()
    assert model.config.sliding_window == 0
    own = scales(model)
    install_log_scaling(model, "always", L, lengths.on_length)
    lengths.announce(256)
    assert scales(model) == pytest.approx([scale * 2 for scale in own])


def test_a_model_without_attention_scales_is_refused_by_name() -> None:
    model = small_model("falcon", alibi=False)
    with pytest.raises(ValueError, match="model_type=falcon does not read its softmax scale"):
        install_log_scaling(model, "eval", L, Lengths().on_length)
    install_log_scaling(model, "off", L, Lengths().on_length)


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="log_scale=sometimes: one of off, eval, always, official, token_eval, token"):
        install_log_scaling(small_model(), "sometimes", L, Lengths().on_length)
    with pytest.raises(ValueError, match="context_len=1"):
        install_log_scaling(small_model(), "eval", 1, Lengths().on_length)
