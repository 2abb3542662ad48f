"""Support for tiled loss and MLPs by model family, judged from the architecture, and whole runs with them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import train
from clex_train.config.engine import EngineConfig
from clex_train.models import memory_options
from clex_train.utils.errors import ConfigError
from tests.helpers.composing import CONF

SHIPPED = sorted(path.name for path in (CONF / "model" / "architectures").iterdir())
TILES = EngineConfig(tiled_loss=8, tiled_mlp=8)
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("name", sorted({*SHIPPED} - {"gemma3_4b"}))
def test_every_shipped_architecture_supports_a_tiled_loss(name: str) -> None:
    arch = AutoConfig.from_pretrained(CONF / "model" / "architectures" / name)
    memory_options.check(EngineConfig(tiled_loss=1024), arch)


def test_the_multimodal_class_of_gemma3_is_refused_with_a_tiled_loss() -> None:
    arch = AutoConfig.from_pretrained(CONF / "model" / "architectures" / "gemma3_4b")
    with pytest.raises(ConfigError, match=r"engine\.tiled_loss=1024"):
        memory_options.check(EngineConfig(tiled_loss=1024), arch)


@pytest.mark.parametrize("name", ["llama2_7b", "qwen3_8b", "phi2", "gpt_neox_20b"])
def test_dense_families_support_tiled_mlps(name: str) -> None:
    memory_options.check(TILES, AutoConfig.from_pretrained(CONF / "model" / "architectures" / name))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma2", {}), ("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.1}), ("olmo2", {})],
)
def test_families_with_known_logit_postprocessing_are_supported(family: str, settings: dict) -> None:
    memory_options.check(TILES, AutoConfig.for_model(family, **{**SMALL, **settings}))


def test_a_family_with_unknown_logit_postprocessing_is_refused_by_name(monkeypatch) -> None:
    arch = AutoConfig.for_model("llama", **SMALL)
    model_class = type(AutoModelForCausalLM.from_config(arch))
    stock = model_class.loss_function

    def smoothed(self):
        return lambda logits, labels, vocab_size, **_: stock.fget(self)(0.99 * logits, labels, vocab_size)

    monkeypatch.setattr(model_class, "loss_function", property(smoothed))
    with pytest.raises(ValueError, match=r"engine\.tiled_loss=8: model_type=llama .*; set it to null"):
        memory_options.check(TILES, arch)


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    arch = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=4)
    memory_options.check(EngineConfig(tiled_loss=8), arch)
    with pytest.raises(ValueError, match=r"engine\.tiled_mlp=8: model_type=mixtral: .* mixture of experts.*null"):
        memory_options.check(TILES, arch)
    arch.output_router_logits = True
    with pytest.raises(ValueError, match=r"engine\.tiled_loss=8: model_type=mixtral .*router"):
        memory_options.check(EngineConfig(tiled_loss=8), arch)


def test_activation_offload_needs_recomputation() -> None:
    with pytest.raises(ValueError, match=r"engine\.offload_activations=True: needs engine\.activation_checkpointing"):
        EngineConfig(offload_activations=True)


@pytest.mark.parametrize("name", ["tiled_loss", "tiled_mlp"])
def test_a_tile_has_at_least_one_token(name: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.{name}=0: at least 1 token"):
        EngineConfig(**{name: 0})


ALL = ("activation_checkpointing=true", "offload_activations=true", "tiled_loss=5", "tiled_mlp=7")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_all_memory_options_ends_at_the_same_weights(tmp_path, tiny_run, stage: int) -> None:
    def final(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        config = tiny_run(
            tmp_path / name,
            "data.document_mask=true",
            "evaluation=never",
            "scaling=clex",
            "scaling.t_max=4",
            "optim.batch_rows=4",
            "optim.steps=4",
            "engine.micro_batch=2",
            f"engine.zero_stage={stage}",
            *overrides,
        )
        train.run(config)
        names = ("model.safetensors", "clex.safetensors")
        return {k: v for part in names for k, v in load_file(tmp_path / name / "final" / part).items()}

    expected, found = final("plain"), final("all", *(f"engine.{option}" for option in ALL))
    for key, tensor in expected.items():
        # AdamW moves a weight by about the learning rate per step, independent of its gradient.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-5, msg=key)
