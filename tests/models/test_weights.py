"""Weights against their architecture, tensor by tensor, with one-line refusals before reading."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from clex_train.cli import loading
from clex_train.cli.evaluation_plan import EvaluateConfig
from clex_train.config.engine import EngineConfig
from clex_train.config.model import ModelConfig
from clex_train.console import arguments
from clex_train.console.errors import explain
from clex_train.console.keys import LoadingConfig
from clex_train.engine import deepspeed as engines
from clex_train.models import architecture, hub, load, weights
from clex_train.models.tokenizer import load_tokenizer
from tests.helpers.tiny_causal_lm import save_tiny_llama, tiny_llama
from tests.helpers.weight_directories import (
    GATE,
    UP,
    load_accepted,
    refusal,
    refusal_of_check,
    rewrite,
    without_tensors,
)


@pytest.fixture
def base(tmp_path) -> Path:
    """Save a model with its tokenizer by save_pretrained."""
    save_tiny_llama(tmp_path / "base")
    return tmp_path / "base"


def test_missing_tensors_are_named(base):
    rewrite(base, without_tensors(UP, GATE))
    assert f"its weights lack 2 tensors ({GATE}, {UP}), which would be drawn at random" in refusal(base)


def test_many_tensors_are_counted(base):
    rewrite(base, lambda tensors: {name: tensor for name, tensor in tensors.items() if ".mlp." not in name})
    assert "its weights lack 6 tensors (model.layers.0.mlp.down_proj.weight, " in refusal(base)


def test_unexpected_tensors_are_named(base):
    rewrite(base, lambda tensors: tensors | {"model.layers.0.mlp.bias_of_mine": torch.zeros(3)})
    assert "has no 1 tensor (model.layers.0.mlp.bias_of_mine), which would be left out" in refusal(base)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.", "_forward_module.module."])
def test_a_prefix_of_a_wrapper_is_named_with_how_to_remove_it(base, prefix):
    rewrite(base, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    line = refusal(base)
    assert f"the names of its tensors begin with `{prefix}`" in line
    assert f"name.removeprefix('{prefix}')" in line


def test_an_unmerged_adapter_is_refused_with_advice_to_merge(base):
    prefix = "base_model.model."
    rewrite(base, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert "merge_and_unload" in refusal(base)


def test_a_directory_with_an_adapter_is_refused(base):
    (base / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json); merge it into its base" in refusal(base)


def test_tensors_of_other_shapes_are_named_with_both(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    line = refusal(base)
    assert "model.layers.0.mlp.down_proj.weight is [48, 64] in its weights and [48, 96] by its config.json" in line
    assert "(and 5 more)" in line


def test_a_git_lfs_pointer_is_named_with_the_command(base):
    file = base / "model.safetensors"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n")
    assert refusal(base).startswith(f"{file}: a git-lfs pointer instead of the file; run `git lfs pull`")


@pytest.mark.parametrize("kept", [0, 6, 200, -1])
def test_a_file_cut_short_is_named(base, kept):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(base).startswith(f"{file}: not readable weights, cut short or damaged (")


def test_missing_shards_of_an_index_are_named(base):
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert f"names 1 file ({shards[1].name}), not there" in refusal(base)


def test_an_index_that_is_a_git_lfs_pointer_is_named(base):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a git-lfs pointer instead of the file" in refusal(base)


def test_a_directory_without_weights_is_refused_with_its_contents(base):
    (base / "model.safetensors").rename(base / "consolidated.00.pth")
    line = refusal(base)
    assert "no weights in it (model.safetensors or an index of shards)" in line
    assert "consolidated.00.pth is not in transformers' layout" in line


def test_pickled_weights_are_checked_and_read_as_well(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({name: tensor for name, tensor in tensors.items() if name != UP}, base / "pytorch_model.bin")
    assert f"its weights lack 1 tensor ({UP})" in refusal(base)
    torch.save(tensors, base / "pytorch_model.bin")
    loaded = load_accepted(base)
    assert torch.equal(loaded.model.state_dict()[UP], tensors[UP])
    (base / "pytorch_model.bin").write_bytes(b"PK not a checkpoint")
    assert "pytorch_model.bin: not readable weights" in refusal(base)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "fp8", "mxfp4"])
def test_quantised_weights_are_refused_before_a_library_is_needed(base, method):
    config = json.loads((base / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": method, "bits": 4}}
    (base / "config.json").write_text(json.dumps(quantised))
    assert f"its weights are quantised ({method}) and cannot be trained whole" in refusal(base)


def test_tied_embeddings_that_are_stored_once_are_not_missing(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    arch = AutoConfig.from_pretrained(tmp_path)
    weights.check(ModelConfig(path=str(tmp_path)), arch)
    # Both may be present, as in pickled checkpoints.
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    weights.check(ModelConfig(path=str(tmp_path)), arch)


def test_experts_that_transformers_merges_are_not_missing(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    arch = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(arch).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("experts.3.w2" in name for name in names), "stored under other names than the model's"
    weights.check(ModelConfig(path=str(tmp_path)), arch)
    rewrite(
        tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.block_sparse_moe.experts.3" not in n}
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts"):
        weights.check(ModelConfig(path=str(tmp_path)), arch)


def test_weights_of_another_float_type_are_matched_by_shape(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    weights.check(ModelConfig(path=str(tmp_path)), AutoConfig.from_pretrained(tmp_path))


def test_buffers_of_old_checkpoints_are_left_to_transformers(base):
    rewrite(base, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    load_accepted(base)


def test_tensors_that_may_be_missing_are_initialised_and_named(base, caplog, monkeypatch):
    rewrite(base, without_tensors(UP, GATE))
    assert f"its weights lack 1 tensor ({GATE})" in refusal(base, allow_missing=["*.up_proj.weight"])
    # On a terminal, where transformers prints by itself.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load_accepted(base, allow_missing=["*.up_proj.weight", GATE])
    assert caplog.messages == [f"model.allow_missing: drawn from the seed: {GATE}, {UP}"]
    AutoModelForCausalLM.from_pretrained(base)
    assert weights.REPORT in caplog.messages[-1], "the table of transformers, which that line stands for"
    assert float(loaded.model.state_dict()[UP].std()) > 0


def test_tensors_that_may_be_left_out_are_named(base, caplog):
    rewrite(base, lambda tensors: tensors | {"vision.weight": torch.zeros(3)})
    caplog.set_level("WARNING", logger="clex_train")
    load_accepted(base, allow_missing=["vision.*"])
    assert "model.allow_missing: left out: vision.weight" in caplog.text


def test_masks_and_frequencies_of_old_checkpoints_are_not_weights(tmp_path):
    arch = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=16)
    AutoModelForCausalLM.from_config(arch).save_pretrained(tmp_path / "gpt2")
    neo = GPTNeoConfig(
        hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], vocab_size=61,
        max_position_embeddings=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(neo).save_pretrained(tmp_path / "neo")
    square, mask = torch.ones(1, 1, 16, 16, dtype=torch.bool), torch.tensor(-1e9)
    for name, attention in (("gpt2", "attn"), ("neo", "attn.attention")):
        carried = {f"transformer.h.0.{attention}.bias": square, f"transformer.h.0.{attention}.masked_bias": mask}
        rewrite(tmp_path / name, lambda tensors, carried=carried: tensors | carried)
        model = ModelConfig(path=str(tmp_path / name))
        weights.check(model, architecture.to_read(model))
        *_, report = load._from_pretrained(model, torch.float32, None, None)
        weights.check_loaded(model, architecture.to_read(model), report)


def test_a_bias_with_the_name_of_a_mask_is_not_ignored(base):
    rewrite(base, lambda tensors: tensors | {"model.layers.0.attention.bias": torch.ones(48)})
    assert "has no 1 tensor (model.layers.0.attention.bias), which would be left out" in refusal(base)
    rewrite(base, lambda tensors: tensors | {"model.layers.0.attention.bias": torch.ones(1, 1, 16, 16)})
    load_accepted(base)


@pytest.fixture
def hub_name(base, monkeypatch) -> str:
    """Place the model as `hf download` would, on a machine without network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(base.parent / "hub"))
    hub.unreachable.cache_clear()
    repository = base.parent / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "refs" / "older").write_text("0ddba11")
    shutil.copytree(base, repository / "snapshots" / "c0ffee")
    yield "owner/model"
    hub.unreachable.cache_clear()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "zero3"])
def test_a_hub_name_is_loaded_and_its_tensors_are_checked(base, hub_name, sharded):
    settings = None
    if sharded:
        engines.open_process_group(EngineConfig())
        settings = engines.inference_dict(EngineConfig())
    loaded = load.load_for_evaluation(ModelConfig(path=hub_name), sharding=settings)
    assert all(hasattr(parameter, "ds_tensor") is sharded for parameter in loaded.model.parameters())
    own = loaded.model.get_parameter(UP)
    stored = load_file(base / "model.safetensors")[UP]
    assert torch.equal(getattr(own, "ds_tensor", own).detach().view(-1).cpu(), stored.view(-1))

    snapshot = base.parent / "hub" / "models--owner--model" / "snapshots" / "c0ffee"
    rewrite(snapshot, without_tensors(UP))
    rewrite(snapshot, lambda tensors: tensors | {"of_mine": torch.ones(2)})
    with pytest.raises(ValueError, match=r"^model\.path=owner/model: its weights lack 1 tensor .*no 1 tensor \(of_min"):
        load.load_for_evaluation(ModelConfig(path=hub_name), sharding=settings)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "zero3"])
def test_a_misshapen_tensor_of_a_hub_name_is_refused_early(base, hub_name, sharded, monkeypatch):
    snapshot = base.parent / "hub" / "models--owner--model" / "snapshots" / "c0ffee"
    rewrite(snapshot, lambda tensors: tensors | {UP: tensors[UP][:, 1:].contiguous()})
    settings = engines.inference_dict(EngineConfig()) if sharded else None
    monkeypatch.setattr(load, "_load_weights", None)
    with pytest.raises(ValueError, match=rf"^model\.path=owner/model: {UP} is .* in its weights and .* by its config"):
        load.load_for_evaluation(ModelConfig(path=hub_name), sharding=settings)


def test_a_hub_name_with_a_missing_cached_shard_is_left_to_the_loader(base, hub_name):
    snapshot = base.parent / "hub" / "models--owner--model" / "snapshots" / "c0ffee"
    (snapshot / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {UP: "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    model = ModelConfig(path=hub_name)
    weights.check(model, architecture.to_read(model))


def test_a_tokenizer_has_the_revision_of_its_weights(base, hub_name):
    snapshots = base.parent / "hub" / "models--owner--model" / "snapshots"
    shutil.copytree(snapshots / "c0ffee", snapshots / "0ddba11")
    file = snapshots / "0ddba11" / "tokenizer.json"
    file.write_text(file.read_text().replace('"60"', '"sixty"'))
    of_main, of_older = (ModelConfig(path=hub_name, revision=name) for name in (None, "older"))
    assert "60" in load_tokenizer(hub_name, of_main).get_vocab()
    assert "sixty" in load_tokenizer(hub_name, of_older).get_vocab()
    with pytest.raises(ValueError, match=r"^owner/model: no readable tokenizer \("):
        load_tokenizer(hub_name, ModelConfig(path=hub_name, revision="no_such_branch"))


@pytest.mark.parametrize("error", [KeyError("experts"), AttributeError("'list' has no items"), AssertionError()])
def test_loader_errors_for_inconsistent_files_are_reported_in_one_line(base, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    assert "its weights do not fit its architecture (" in refusal_of_check(base)
    monkeypatch.setattr(weights, "check", lambda *_: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"^model\.path=.*: the weights cannot be loaded \(") as raised:
        load.load_for_evaluation(ModelConfig(path=str(base)))
    assert explain(raised.value) is not None


def test_an_unreachable_hub_is_not_blamed_if_the_files_exist(hub_name, monkeypatch):
    def fail(*_, **__):
        raise KeyError("experts")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"the weights cannot be loaded \(KeyError: 'experts'\)$"):
        load.load_for_evaluation(ModelConfig(path=hub_name))


def test_out_of_memory_or_a_lost_rank_is_not_blamed_on_the_files(base, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        load.load_for_evaluation(ModelConfig(path=str(base)))
    error = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"):
        load.load_for_evaluation(ModelConfig(path=str(base)), sharding=engines.inference_dict(EngineConfig()))


def test_evaluation_programs_name_their_own_keys(base, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rewrite(base, without_tensors(UP))
    with pytest.raises(ValueError, match=r"; copy .* again, or name what may differ in allow_missing$"):
        loading.locate(LoadingConfig(model=str(base)))
    source = loading.locate(LoadingConfig(model=str(base), allow_missing=["*.up_proj.weight"]))
    caplog.set_level("WARNING", logger="clex_train")
    drawn = [load.load_for_evaluation(source.model).model.get_parameter(UP) for _ in range(2)]
    assert torch.equal(*drawn), "the same on every rank"
    assert f"allow_missing: drawn from the seed: {UP}" in caplog.messages
    assert arguments.parse(EvaluateConfig, [f"model={base}", "data=x", "allow_missing=[lm_head.*]"]).allow_missing == [
        "lm_head.*"
    ]
