"""Liger kernels: the modules they replace, on the instance only, and equal results on a GPU."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clex_train.config.engine import Liger
from clex_train.engine import liger

COMMON = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}
IDS = torch.arange(3, 43).reshape(2, 20)

# Plain operations in place of the kernels show which modules they would replace.
PLAIN = liger.Kernels(
    lambda x, weight, epsilon: (
        weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    ),
    lambda a, b: torch.nn.functional.silu(a) * b,
)


def model_of(family: str, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(COMMON | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_and_gradients(model):
    loss = model(input_ids=IDS.to(model.device), labels=IDS.to(model.device), use_cache=False).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("family", "changes", "number"),
    [
        ("llama", {}, 2 * 3 + 1),
        ("mistral", {}, 2 * 3 + 1),
        ("qwen3", {}, 2 * 5 + 1),
        ("llama", {"hidden_act": "gelu"}, 2 * 2 + 1),
        ("gpt_neox", {}, 0),
    ],
)
def test_norms_and_gated_mlps_of_a_family_are_replaced(family, changes, number):
    model = model_of(family, **changes)
    reference = copy.deepcopy(model)
    assert len(liger.install(model, PLAIN)) == number
    torch.testing.assert_close(loss_and_gradients(model), loss_and_gradients(reference), rtol=1e-5, atol=1e-6)


def test_a_norm_that_scales_by_one_plus_its_weight_is_not_replaced():
    model = model_of("gemma", hidden_act="gelu")
    assert liger.install(model, PLAIN) == []


def test_other_models_of_the_family_and_its_classes_are_unchanged():
    model, other = model_of("llama"), model_of("llama")
    forward = type(model.model.norm).forward
    replaced = liger.install(model, PLAIN)
    assert type(model.model.norm).forward is forward
    assert not any("forward" in module.__dict__ for module in other.modules())
    liger.remove(replaced)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_module_with_an_already_replaced_forward_is_not_changed():
    model = model_of("llama")
    model.model.layers[0].mlp.forward = lambda x: x
    assert model.model.layers[0].mlp not in liger.install(model, PLAIN)
    assert liger.install(model, PLAIN) == [], "twice"


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = model_of("llama")
    liger.install(model, PLAIN)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert twin(IDS).logits.abs().max() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_requesting_the_kernels_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"engine\.liger=always: there is no GPU: pip install .*requirements-gpu"):
        liger.check(Liger.always)
    for choice in (Liger.auto, Liger.never):
        liger.check(choice)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: None if name == "liger_kernel" else object())
    assert liger.refusal() == "liger_kernel not installed"
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    assert liger.refusal() is None


@pytest.mark.gpu
@pytest.mark.skipif(liger.refusal() is not None, reason="no liger-kernel or no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_liger_kernels_match_the_loss_and_gradients_of_the_modules(dtype, tolerance):
    model = model_of("llama", hidden_size=256, head_dim=64, intermediate_size=512).cuda().to(dtype)
    reference = copy.deepcopy(model)
    assert liger.install(model, liger.kernels())
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(model), loss_and_gradients(reference)
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < tolerance
