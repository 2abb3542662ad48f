"""Layers without rotation keep their keys; models whose rotated layers all have short windows are refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from clex_train.api import apply_clex
from clex_train.attention import kv_cache
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.model import Init, ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import ScalingConfig
from clex_train.evaluation import methods
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models import architecture
from clex_train.models.load import LoadedModel, load_for_training, trained_architecture
from clex_train.rope.native import install_native
from clex_train.rope.patch import install_rotary
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum
from tests.rope.rotary_families import CONTEXT, from_config, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
HYBRID = ["sliding_attention", "full_attention"]
SOME_WITHOUT: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": {"layer_types": HYBRID, "sliding_window": 40, "head_dim": 8},
    "exaone_moe": {
        "layer_types": HYBRID, "sliding_window": 40, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "mlp_layer_types": ["dense", "dense"],
    },
    "cohere2": {"layer_types": HYBRID, "sliding_window": 40, "head_dim": 8},
    "afmoe": {
        "layer_types": HYBRID, "sliding_window": 40, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "num_dense_layers": 2,
    },
}  # fmt: skip
"""Layer 0 rotates and layer 1 does not."""
UNSCALABLE: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 16},
}


def model_of(kind: str, num_layers: int = 2, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    arch = AutoConfig.for_model(kind, **{**SIZES, "num_hidden_layers": num_layers, **settings})
    model = from_config(arch).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(20)
    return model


@pytest.mark.parametrize("kind", SOME_WITHOUT)
def test_layers_are_probed_one_by_one(kind: str) -> None:
    handle = install_native(model_of(kind, **SOME_WITHOUT[kind]), CONTEXT)
    assert handle.scaled_layers == {0: True, 1: False}


@pytest.mark.parametrize("kind", SOME_WITHOUT)
@torch.no_grad()
def test_keys_of_layers_without_rotation_are_bitwise_unchanged_when_t_moves(kind: str) -> None:
    model, ids = model_of(kind, **SOME_WITHOUT[kind]), tokens(1, CONTEXT + 1)
    handle = install_native(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, [1.0, 2.0]))
    cache = kv_cache.require_in_output(model(ids[:, :CONTEXT], use_cache=True))
    before = [layer.keys.clone() for layer in cache.layers]
    model(ids[:, CONTEXT:], use_cache=True, **kv_cache.as_kwargs(model, cache))
    rotated, plain = (layer.keys[:, :, :CONTEXT] for layer in cache.layers)
    assert torch.equal(plain, before[1])
    assert (rotated - before[0]).abs().max() > 1e-2


@torch.no_grad()
def test_a_model_of_one_layer_without_rotation_is_the_same_with_a_cache() -> None:
    model, ids = model_of("smollm3", 1, no_rope_layers=[0]), tokens(1, CONTEXT + 1)
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, [1.0, 2.0]))
    cache = kv_cache.require_in_output(model(ids[:, :CONTEXT], use_cache=True))
    cached = model(ids[:, CONTEXT:], use_cache=True, **kv_cache.as_kwargs(model, cache)).logits[:, -1]
    assert torch.allclose(cached, model(ids, use_cache=False).logits[:, -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2"])
def test_windows_in_every_layer_are_refused_with_a_remedy(kind: str) -> None:
    model = model_of(kind, sliding_window=12)
    remedy = rf"model_type={kind}: .* window of 12 tokens, at most L = 16.*; set sliding_window to null in config.json"
    with pytest.raises(ValueError, match=remedy):
        apply_clex(model, context_len=CONTEXT)
    with pytest.raises(ValueError, match=remedy):
        require_scalable_config(model.config, CONTEXT)
    install_rotary(model, CONTEXT).undo()
    model.config.sliding_window = None
    require_scalable_config(model.config, CONTEXT)


@pytest.mark.parametrize("kind", ["exaone4", "exaone_moe", "cohere2", "afmoe"])
def test_windows_with_layers_without_positions_are_refused_with_a_reason(kind: str) -> None:
    settings = {**SOME_WITHOUT[kind], "sliding_window": 12}
    with pytest.raises(ValueError, match=f"model_type={kind}: .*layers with full attention have no positions"):
        apply_clex(model_of(kind, **settings), context_len=CONTEXT)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2", "gemma4_text"])
def test_a_model_that_cannot_be_scaled_trains_unscaled(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, **UNSCALABLE.get(kind, {"sliding_window": 12}))
    model.save_pretrained(tmp_path)
    base = ModelConfig(path=str(tmp_path), init=Init.pretrained, context_len=CONTEXT, config=None)
    config = Config(model=base, scaling=ScalingConfig(name=Method.none))
    loaded = load_for_training(config, architecture.to_train(base), torch.float32, {})
    ids = tokens(1, 2 * CONTEXT)
    with loaded.handle.training(Spectrum(loaded.base_inv_freq)):
        found = loaded.model(ids).logits
    assert torch.allclose(found, model(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=f"model_type={kind}: "):
        trained_architecture(
            dataclasses.replace(config, scaling=ScalingConfig(name=Method.clex)), architecture.to_train(base)
        )


@torch.no_grad()
def test_frequencies_of_0_are_evaluated_unchanged_and_not_extended() -> None:
    model = model_of("gemma4_text", **UNSCALABLE["gemma4_text"])
    handle, ids = install_native(model, CONTEXT), tokens(1, 2 * CONTEXT)
    before = model(ids).logits
    loaded = LoadedModel(model, handle, CONTEXT)
    spec = EvaluationConfig(methods=[Method.trained, Method.none], lengths=[2 * CONTEXT])
    for table in methods.model_tables(spec, loaded).values():
        handle.use(table)
        assert torch.allclose(model(ids).logits, before, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="frequencies are 0"):
        methods.model_tables(dataclasses.replace(spec, methods=[Method.pi]), loaded)


def test_a_window_beyond_l_or_a_layer_without_a_window_can_be_extended() -> None:
    install_rotary(model_of("mistral", sliding_window=40), CONTEXT).require_scalable()
    local = {"sliding_window": 12, "layer_types": HYBRID, "head_dim": 8}
    install_rotary(model_of("gemma2", **local), CONTEXT).require_scalable()
    install_rotary(model_of("smollm3", no_rope_layers=[1, 0]), CONTEXT).require_scalable()


def test_frequencies_of_0_are_refused_by_name_without_listing_them() -> None:
    config = AutoConfig.for_model("gemma4_text", **{**SIZES, "num_hidden_layers": 6, **UNSCALABLE["gemma4_text"]})
    with pytest.raises(ValueError, match=r"^rope_type=proportional of model_type=gemma4_text: \d+ of its") as refused:
        require_scalable_config(config, CONTEXT)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("doge", {"head_dim": 8}, "builds masks of its own"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "learned sinks"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "layers 1 have no positions"),
        ("cohere2", SOME_WITHOUT["cohere2"], "layers 1 have no positions"),
    ],
)
def test_lm_infinite_refuses_unsupported_models_before_the_first_call(
    kind: str, settings: dict[str, Any], reason: str
) -> None:
    model = model_of(kind, **settings)
    with pytest.raises(ValueError, match=rf"^model_type={kind}: lm_infinite does not support it \(.*{reason}"):
        apply_lm_infinite(model, 8, 2)


@torch.no_grad()
def test_right_padding_and_a_windowed_cache_are_refused_and_a_full_cache_is_exact() -> None:
    from transformers import DynamicCache

    model = model_of("gemma2", sliding_window=6, layer_types=HYBRID, head_dim=8)
    apply_lm_infinite(model, 16, 2)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 6:12] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits[1, 12:]

    def continuation(cache: DynamicCache) -> torch.Tensor:
        given = {"use_cache": True, **kv_cache.as_kwargs(model, cache)}
        model(ids[:, :12], attention_mask=mask[:, :12], **given)
        return model(ids[:, 12:], attention_mask=mask, **given).logits[1]

    assert torch.allclose(continuation(DynamicCache()), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"^attention_mask with padding behind tokens: .*; pad on the left, or use"):
        continuation(DynamicCache(config=model.config))


@torch.no_grad()
def test_a_decoding_step_under_lm_infinite_reads_its_padding_once_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import DynamicCache

    def count_reads(num_layers: int) -> int:
        types = ["sliding_attention"] * (num_layers - 1) + ["full_attention"]
        model = model_of("gemma2", num_layers, sliding_window=6, layer_types=types, head_dim=8)
        apply_lm_infinite(model, 16, 2)
        cache, ids, mask = DynamicCache(config=model.config), tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
        mask[1, :3] = 0
        given = {"use_cache": True, **kv_cache.as_kwargs(model, cache)}
        model(ids[:, :19], attention_mask=mask[:, :19], **given)
        seen, read = [], torch.Tensor.__bool__
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", lambda x: seen.append(x) or read(x))
            model(ids[:, 19:], attention_mask=mask, **given)
        return len(seen)

    assert count_reads(4) - count_reads(2) == 2
