"""Resolution of `attention.implementation=auto` and the name of the kernel."""

import pytest
import torch
from transformers import AutoConfig

from clex_train.attention import select
from clex_train.config.attention import AttentionConfig, AttentionImplementation
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.models import load
from clex_train.models.architecture import to_train
from tests.rope.rotary_families import tiny_model, tokens

LLAMA = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
GEMMA2 = AutoConfig.for_model("gemma2", hidden_size=64, num_attention_heads=2, head_dim=32, num_hidden_layers=1)
FLASH, SDPA = AttentionImplementation.flash_attention_2, AttentionImplementation.sdpa
EAGER = AttentionImplementation.eager
CPU = torch.device("cpu")


@pytest.fixture
def flash(monkeypatch):
    """Pretend that flash-attn and a GPU are present."""
    monkeypatch.setattr(select, "is_flash_attn_2_available", lambda: True)


@pytest.mark.skipif(select.is_flash_attn_2_available(), reason="flash-attn is installed")
def test_auto_is_sdpa_without_flash_attn():
    assert select.choose_implementation(AttentionConfig(), LLAMA, torch.bfloat16) is SDPA


@pytest.mark.usefixtures("flash")
def test_auto_is_flash_attention_when_installed():
    assert select.choose_implementation(AttentionConfig(), LLAMA, torch.bfloat16) is FLASH


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("configured", [item for item in AttentionImplementation if item.value != "auto"])
def test_an_explicit_implementation_is_not_changed(configured):
    assert select.choose_implementation(AttentionConfig(implementation=configured), LLAMA, torch.float32) is configured


@pytest.mark.parametrize("configured", [AttentionConfig(), AttentionConfig(lambda_mask=True)])
def test_auto_is_eager_when_neither_kernel_supports_the_model(configured, monkeypatch):
    """Resolve to eager; transformers before 5.21 claims that SDPA supports the caps of Gemma 2, and drops them."""
    monkeypatch.setattr(select.AutoModelForCausalLM._model_mapping[type(GEMMA2)], "_supports_sdpa", True)
    assert select.choose_implementation(configured, GEMMA2, torch.float32) is EAGER
    assert select.choose_implementation(configured, AutoConfig.for_model("bloom"), torch.float32) is EAGER
    with pytest.raises(ValueError, match=r"^attention\.implementation=sdpa: not for gemma2; use auto or eager$"):
        select.choose_implementation(AttentionConfig(implementation=SDPA), GEMMA2, torch.float32)


def test_a_model_with_soft_capped_logits_keeps_its_caps_in_training(tmp_path):
    model = tiny_model("gemma2", attn_logit_softcapping=2.0)
    model.save_pretrained(tmp_path)
    spec, ids = ModelConfig(path=str(tmp_path)), tokens(2, 16)
    training = load.load_for_training(Config(model=spec), to_train(spec), torch.float32, {})
    with torch.no_grad():
        expected = model(ids).logits
        for loaded in (load.load_for_evaluation(spec), training):
            torch.testing.assert_close(loaded.model.eval()(ids).logits, expected, rtol=0, atol=1e-6)


class OwnConfig(type(LLAMA)):
    """Stand in for the config of a model that ships its own code."""


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(
    ("arch", "dtype", "reason"),
    [
        (LLAMA, torch.float32, "and bfloat16, not float32"),
        (AutoConfig.for_model("llama", hidden_size=1024, num_attention_heads=2), torch.bfloat16, "the model has 512"),
        (OwnConfig(), torch.bfloat16, "model_type=llama has no flash attention"),
    ],
)
def test_auto_is_sdpa_for_models_that_flash_attention_cannot_compute(arch, dtype, reason):
    assert reason in select.flash_unsupported_reason(arch, dtype)
    assert select.choose_implementation(AttentionConfig(), arch, dtype) is SDPA


@pytest.mark.usefixtures("flash")
def test_lm_infinite_uses_its_own_back_ends():
    assert select.choose_implementation(AttentionConfig(lambda_mask=True), LLAMA, torch.bfloat16) is SDPA


def test_the_named_kernel_is_the_one_that_runs():
    query = torch.randn(1, 2, 32, 32, requires_grad=True)
    with torch.profiler.profile() as recorded:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    called = any("flash_attention" in event.name for event in recorded.events())
    assert (select.sdpa_kernel(LLAMA, 32, torch.float32, CPU) == "flash") is called


def test_the_description_names_kernel_dtype_and_device():
    text = select.describe(SDPA, LLAMA, 4096, torch.float32, CPU)
    assert text == "sdpa, its flash kernel, in float32 on the CPU"
    eager = select.describe(AttentionImplementation.eager, LLAMA, 4096, torch.bfloat16, CPU)
    assert eager == "eager in bfloat16 on the CPU"
