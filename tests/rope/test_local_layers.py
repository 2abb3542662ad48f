"""Layers with a window of at most L tokens keep the frequencies of the model, even if all layers share one RoPE."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clex_train.attention import kv_cache
from clex_train.config.data import DataConfig
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models import architecture
from clex_train.models.load import load_for_training
from clex_train.models.memory_options import recompute_layers
from clex_train.rope.native import install_native
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum, cos_sin
from tests.rope.rotary_families import CONTEXT, tokens
from tests.rope.test_receptive_field import HYBRID, model_of

WINDOW = 12
LOCAL: dict[str, Any] = {"layer_types": HYBRID, "sliding_window": WINDOW}
MIXED: dict[str, dict[str, Any]] = {
    "gemma2": {**LOCAL, "head_dim": 8},
    "qwen2": {**LOCAL, "use_sliding_window": True},
    "qwen3": {**LOCAL, "use_sliding_window": True, "head_dim": 8},
    "gpt_oss": {**LOCAL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Layer 0 has a window below L, layer 1 none; both get the same cos and sin."""
ONCE = {"gpt_oss"}
"""Families whose cos has width P instead of 2 P."""
GRID = [1.0, 2.0, 3.0]


def pair_at(inv_freq: Tensor, num_tokens: int, family: str, factor: float) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [1, S, W] at plain positions, independently of the package."""
    cos, sin = (factor * x.float() for x in cos_sin(torch.arange(num_tokens)[None], inv_freq))
    return (cos, sin) if family in ONCE else (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def with_own_pair(layer: nn.Module, pair: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Replace the cos and sin that `layer` receives; return a function that undoes it."""
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_embeddings": pair}), with_kwargs=True
    )
    return hook.remove


def reference(model: PreTrainedModel, ids: Tensor, inv_freq: Tensor, family: str) -> Tensor:
    """Compute the logits of the untouched model with only its layer 1 rotated by `inv_freq`."""
    factor = float(model.model.rotary_emb.attention_scaling)
    end = with_own_pair(model.model.layers[1], pair_at(inv_freq, ids.shape[1], family, factor))
    logits = model(ids, use_cache=False).logits
    end()
    return logits


def scaled(model: PreTrainedModel) -> RotaryHandle:
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, GRID))
    return handle


@pytest.mark.parametrize("family", MIXED)
@torch.no_grad()
def test_only_layers_with_windows_beyond_l_follow_t(family: str) -> None:
    model, ids = model_of(family, **MIXED[family]), tokens(2, 2 * CONTEXT)
    stock = copy.deepcopy(model)
    handle = scaled(model)
    assert handle.scaled_layers == {0: False, 1: True}
    theta = ntk_table(handle.base_inv_freq, GRID).at(2.0).inv_freq
    found, expected = model(ids, use_cache=False).logits, reference(stock, ids, theta, family)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert (stock(ids).logits - expected).abs().max() > 1e-3
    handle.undo()
    assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("family", MIXED)
@torch.no_grad()
def test_keys_of_local_layers_are_bitwise_unchanged_when_t_moves(family: str) -> None:
    model, ids = model_of(family, **MIXED[family]), tokens(1, CONTEXT + 1)
    scaled(model)
    cache = kv_cache.require_in_output(model(ids[:, :CONTEXT], use_cache=True))
    local, far = (layer.keys.clone() for layer in cache.layers)
    model(ids[:, CONTEXT:], use_cache=True, **kv_cache.as_kwargs(model, cache))
    kept = min(local.shape[2], cache.layers[0].keys.shape[2] - 1)
    assert torch.equal(cache.layers[0].keys[:, :, -kept - 1 : -1], local[:, :, -kept:])
    assert (cache.layers[1].keys[:, :, :CONTEXT] - far).abs().max() > 1e-3


@torch.no_grad()
def test_a_layer_with_a_window_beyond_l_follows_t() -> None:
    model = model_of("gemma2", **{**MIXED["gemma2"], "sliding_window": CONTEXT + 1})
    assert install_rotary(model, CONTEXT).scaled_layers == {0: True, 1: True}


@torch.no_grad()
def test_a_dynamically_scaled_base_applies_to_local_layers_too() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model, ids = model_of("qwen2", **MIXED["qwen2"], rope_parameters=rope), tokens(1, 2 * CONTEXT)
    expected = copy.deepcopy(model)(ids, use_cache=False).logits
    handle = install_native(model, CONTEXT)
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    assert handle.scaled_layers == {0: True, 1: True}


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
@pytest.mark.parametrize("mask_first", [True, False])
@torch.no_grad()
def test_lm_infinite_rotates_local_layers_by_the_models_own_frequencies(family: str, mask_first: bool) -> None:
    model, ids = model_of(family, **MIXED[family]), tokens(2, 2 * CONTEXT)
    expected_model, far = copy.deepcopy(model), 4 * CONTEXT
    scaled(expected_model)
    if mask_first:
        apply_lm_infinite(model, far, 0)
    scaled(model)
    if not mask_first:
        apply_lm_infinite(model, far, 0)
    # With a window over every token, the Lambda-shaped mask hides nothing.
    expected = expected_model(ids, use_cache=False).logits
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_and_sampled_positions_do_not_affect_local_layers(family: str, dtype: torch.dtype) -> None:
    ids = tokens(2, CONTEXT)
    positions = 3.0 * torch.arange(CONTEXT).double().expand(2, -1)

    def gradients(recompute: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        model = model_of(family, **MIXED[family]).to(dtype).train()
        if recompute:
            recompute_layers(model)
        handle = install_rotary(model, CONTEXT)
        theta = (scale * handle.base_inv_freq).requires_grad_()
        with handle.training(Spectrum(theta, 2.0), positions):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert theta.grad is not None
        return theta.grad, model.model.layers[0].self_attn.k_proj.weight.grad

    plain, again = gradients(False), gradients(True)
    assert (plain[0] != 0).all()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert not torch.equal(gradients(False, 0.5)[1], plain[1])


@torch.no_grad()
def test_local_layers_get_plain_positions_while_others_are_sampled() -> None:
    model, ids = model_of("gemma2", **MIXED["gemma2"]), tokens(1, CONTEXT)
    stock = copy.deepcopy(model)
    handle = install_rotary(model, CONTEXT)
    positions = 2.5 * torch.arange(CONTEXT).double()[None]
    with handle.training(Spectrum(handle.base_inv_freq), positions):
        found = model(ids, use_cache=False).logits
    # 2.5 m theta = m (2.5 theta).
    assert torch.allclose(found, reference(stock, ids, 2.5 * handle.base_inv_freq, "gemma2"), atol=1e-4, rtol=0)


def test_a_recipe_by_formula_reports_that_it_scales_local_layers_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_of("gemma2", **MIXED["gemma2"]).save_pretrained(tmp_path)
    base = ModelConfig(path=str(tmp_path), context_len=CONTEXT)
    scaling = ScalingConfig(name=Method.yarn, factor=4.0, positions=Positions.skip)
    config = Config(model=base, data=DataConfig(seq_len=CONTEXT), scaling=scaling)
    with caplog.at_level("WARNING", logger="clex_train"):
        loaded = load_for_training(config, architecture.to_train(base), torch.float32, {})
    assert "scaling=yarn: layers 0 attend to at most L tokens" in caplog.text
    ids = tokens(1, CONTEXT)
    assert loaded.formula is not None
    with loaded.handle.training(loaded.formula):
        found = loaded.model(ids).logits
    loaded.handle.undo()
    assert torch.allclose(found, loaded.model(ids).logits, atol=1e-4, rtol=0)
