"""Checks of weight files: tied tensors, dtypes, shards, indices and nested files."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig

from clex_train.config.engine import EngineConfig
from clex_train.config.model import ModelConfig
from clex_train.console.errors import explain
from clex_train.engine import deepspeed as engines
from clex_train.engine.nan_check import non_finite_parameter
from clex_train.models import architecture, load, weight_files, weights
from tests.helpers.tiny_causal_lm import save_tiny_llama, tiny_llama
from tests.helpers.warm_processes import call_on_two_ranks
from tests.helpers.weight_directories import GATE, UP, load_accepted, refusal, refusal_of_check, rewrite

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path) -> Path:
    """Save a model with its tokenizer by save_pretrained."""
    save_tiny_llama(tmp_path / "base")
    return tmp_path / "base"


def change_config(directory: Path, **facts) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def split_into_shards(directory: Path) -> list[Path]:
    """Split the weights over files with an index; return the shards."""
    tensors = load_file(directory / "model.safetensors")
    tiny_llama().save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        save_file({name: tensors[name] for name in load_file(shard)}, shard, metadata={"format": "pt"})
    return shards


def save_as_pickle(directory: Path, content: object) -> Path:
    (directory / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, directory / "pytorch_model.bin")
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize("layout", ["whole", "sharded", "pickled", "old pickle"])
def test_tied_tensors_with_different_values_are_named_with_a_remedy(base, layout, monkeypatch):
    monkeypatch.setattr(weight_files, "ROWS", 7)  # 61 rows are compared in several chunks, and the last one differs.
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    if layout == "sharded":
        shards = split_into_shards(base)
        holders = [shard.name for shard in shards if {HEAD, EMBEDDING} & load_file(shard).keys()]
        assert len(holders) == 2, "in two files"
    elif layout != "whole":
        save_as_pickle(base, tensors)
        if layout == "old pickle":
            torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    change_config(base, tie_word_embeddings=True)
    assert (
        f"its weights hold {HEAD} and {EMBEDDING} with different values, and its config.json makes them one tensor "
        "(tie_word_embeddings); set tie_word_embeddings=false in config.json, or remove lm_head.weight from the weights"
    ) in refusal(base)
    change_config(base, tie_word_embeddings=False)
    assert not torch.equal(load_accepted(base).model.lm_head.weight[-1], tensors[EMBEDDING][-1])


def test_tied_tensors_are_compared_in_a_file_of_the_model_body(tmp_path):
    arch = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=16)
    AutoModelForCausalLM.from_config(arch).save_pretrained(tmp_path)

    def to_openai_layout(tensors):
        body = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return body | {HEAD: body["wte.weight"] + 1}

    rewrite(tmp_path, to_openai_layout)
    assert f"its weights hold {HEAD} and wte.weight with different values" in refusal_of_check(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {HEAD: tensors["wte.weight"].clone()})
    weights.check(ModelConfig(path=str(tmp_path)), arch)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
def test_non_floating_point_parameters_are_named(base, dtype):
    rewrite(base, lambda tensors: tensors | {UP: tensors[UP].to(dtype)})
    short = str(dtype).removeprefix("torch.")
    assert f"its weights hold 1 tensor ({UP}) as {short}, which would be cast without" in refusal(base)
    save_as_pickle(base, load_file(base / "model.safetensors"))
    assert f"1 tensor ({UP}) as {short}" in refusal(base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_is_named_with_a_remedy(base, dtype):
    rewrite(base, lambda tensors: tensors | {GATE: tensors[GATE].to(dtype), UP: tensors[UP].to(dtype)})
    line = refusal(base)
    assert f"2 tensors ({GATE}, {UP}) as {str(dtype).removeprefix('torch.')}" in line
    assert line.endswith("without the scales of a quantisation; give a copy of the model in bfloat16")


def test_integers_in_tensors_that_transformers_merges_are_found(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    arch = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(arch).save_pretrained(tmp_path)
    expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    rewrite(tmp_path, lambda tensors: tensors | {expert: tensors[expert].to(torch.int8)})
    assert "(model.layers.0.mlp.experts.down_proj) as int8" in refusal_of_check(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_and_positions_of_old_checkpoints_are_not_parameters(tmp_path, dtype):
    arch = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(arch).save_pretrained(tmp_path)
    carried = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 16, 16, dtype=dtype)}
    rewrite(tmp_path, lambda tensors: tensors | carried)
    model = ModelConfig(path=str(tmp_path))
    weights.check(model, architecture.to_read(model))


def test_half_and_double_precision_are_accepted(base):
    rewrite(base, lambda tensors: tensors | {UP: tensors[UP].half(), GATE: tensors[GATE].double()})
    load_accepted(base)


def test_a_tensor_in_two_shards_is_named_with_both(base):
    first, *_, last = split_into_shards(base)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last, metadata={"format": "pt"})
    assert f"1 tensor ({name}) in both {first.name} and {last.name}, and only one" in refusal(base)


def test_an_index_that_names_another_file_is_refused_with_both(base):
    first, *_, last = split_into_shards(base)
    name = next(iter(load_file(first)))
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][name] = last.name
    (base / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} says that {name} is in {last.name}, and it is in {first.name}; copy the index" in refusal(base)


@pytest.mark.parametrize("facts", [{}, {"metadata": None}])
def test_an_index_without_metadata_is_refused_with_the_remedy(base, facts):
    split_into_shards(base)
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], **facts}))
    assert 'no `metadata` in it, without which transformers does not read an index; add "metadata": {}' in refusal(base)
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], "metadata": {}}))
    load_accepted(base)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_nested_file_is_named_with_how_to_unpack_it(base, key):
    file = save_as_pickle(base, {key: load_file(base / "model.safetensors"), "epoch": 3, "step": torch.tensor(5)})
    line = refusal(base)
    assert line.startswith(
        f"{file}: a trainer's checkpoint, with tensors nested under `{key}`; save those of the model"
    )
    assert f"torch.save(torch.load(FILE)['{key}'], FILE)" in line
    torch.save(torch.load(file)[key], file)
    load_accepted(base)


def test_a_file_with_trainer_objects_is_not_reported_as_damaged(base):
    file = save_as_pickle(base, {"state_dict": {}, "config": ModelConfig()})
    assert refusal(base).startswith(f"{file}: it has Python objects in addition to tensors, as a trainer's")


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "zero3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_not_evaluated(base, value, sharded):
    def spoil(tensors):
        tensors[UP][3, 4] = value
        return tensors

    rewrite(base, spoil)
    settings = None
    if sharded:
        engines.open_process_group(EngineConfig())
        settings = engines.inference_dict(EngineConfig())
    with pytest.raises(ValueError, match="not finite") as raised:
        load.load_for_evaluation(ModelConfig(path=str(base)), sharding=settings)
    assert explain(raised.value) == (
        f"model.path={base}: the weights of {UP} are not finite: copy them again, or give others, such as an earlier "
        "checkpoint"
    )


def test_ranks_agree_on_a_non_finite_value_of_one_rank(tmp_path):
    call_on_two_ranks(_judge_shards, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["weight", "weight"]


def _judge_shards(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    # ZeRO-3 leaves a parameter empty between forwards, with its shard in another attribute.
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.ds_tensor = torch.tensor([1.0, math.nan if rank == 1 else 2.0])
    layer.weight.data = torch.empty(0)
    (Path(folder) / str(rank)).write_text(str(non_finite_parameter(layer)))


def test_finite_weights_whose_sum_overflows_are_evaluated(base):
    rewrite(base, lambda tensors: tensors | {UP: torch.full_like(tensors[UP], 3e38)})
    load_accepted(base)
