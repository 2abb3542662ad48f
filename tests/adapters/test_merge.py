"""Merged weights against the model with adapters, and adapter files as peft reads them."""

import copy

import pytest
import torch

from clex_train.adapters import lora, merge
from tests.adapters.adapted import LONGLORA, adapt, gathered
from tests.engine.test_token_loss import build, rows

peft = pytest.importorskip("peft")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows()[0], use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi", "mixtral"])
def test_merged_logits_equal_those_of_the_model_with_adapters(family):
    model = build(family)
    stock = copy.deepcopy(model)
    before = logits(stock)
    trained = adapt(model, targets=["all-linear"], **LONGLORA)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1, "the adapters do something"
    weights = merge.merge(gathered(model), trained)
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert not unexpected
    # A tied output layer has no name of its own, and no tensor but it may be missing.
    assert {*missing} <= {"lm_head.weight"}
    assert (logits(stock) - expected).abs().max() < 1e-4


def test_a_sum_is_rounded_once():
    weight, down, up = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((8, 6), (4, 6), (8, 4))
    )
    model = build("llama")
    trained = adapt(model)
    stored = {"a.base_layer.weight": weight, "a.lora_A.default.weight": down, "a.lora_B.default.weight": 1e-3 * up}
    given = {name: tensor.bfloat16() for name, tensor in stored.items()}
    base, low, high = (tensor.double() for tensor in given.values())
    exact = base + trained.config.alpha / trained.config.r * high @ low
    merged = merge.merge(given, trained)
    assert not given
    assert torch.equal(merged["a.weight"], exact.bfloat16())


def test_the_models_own_layers_come_back():
    model = build("llama")
    before, classes = logits(model), [type(module) for module in model.modules()]
    names = list(model.state_dict())
    adapt(model, targets=["all-linear"])
    assert (logits(model) - before).abs().max() > 0.1
    lora.remove(model)
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names
    assert not hasattr(model, "peft_config")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("beside", [{}, LONGLORA], ids=["lora", "longlora"])
def test_the_saved_adapter_reloads_with_embeddings_and_norms(family, beside, tmp_path):
    model = build(family)
    base = copy.deepcopy(model)
    trained = adapt(model, **beside)
    expected = logits(model)
    found = merge.tensors(gathered(model), trained)
    lora.remove(model)
    merge.write(tmp_path, model, found, trained, base="path/of/base")
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / merge.FOLDER)
    assert (logits(reloaded) - expected).abs().max() < 1e-5
    assert reloaded.peft_config["default"].base_model_name_or_path == "path/of/base"
    merged = reloaded.merge_and_unload()
    assert type(merged) is type(base)
    assert (logits(merged) - expected).abs().max() < 1e-4


def test_ranks_without_weights_have_nothing_to_write_or_merge():
    trained = adapt(build("qwen3"), **LONGLORA)
    assert merge.merge({}, trained) == {}
    assert merge.tensors({}, trained) == {}
