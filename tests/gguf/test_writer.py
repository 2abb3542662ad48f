"""GGUF files as written: read back to the bit, refused where llama.cpp would compute another model, whole or absent."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clex_train.gguf import files, token_ids
from clex_train.gguf.files import contents
from clex_train.gguf.tensors import WeightType
from clex_train.gguf.vocabulary import UNUSED, read_vocabulary, vocabulary_of
from clex_train.utils.errors import ConfigError
from tests.gguf import gguf_models
from tests.gguf.gguf_models import CONTEXT, ROWS, VOCAB_SIZE
from tests.helpers.full_disk import mounted

SERVED = 4 * CONTEXT


def written(tmp_path: Path, family: str, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor], Any]:
    """Write a random model; return the tensors of the file, those of the directory, and the reader."""
    folder = gguf_models.save(tmp_path / family, family)
    factors = gguf_models.factors(gguf_models.num_pairs(folder))
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, factors, SERVED, **options)
    reader = files.read(tmp_path / "model.gguf")
    tensors = {each.name: np.array(each.data) for each in reader.tensors}
    return tensors, load_file(folder / "model.safetensors"), reader


def interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of every head one by one: component j to 2j, component j + D/2 to 2j + 1."""
    result = torch.empty_like(rows)
    width = len(rows) // num_heads
    for head in range(num_heads):
        for j in range(width // 2):
            result[head * width + 2 * j] = rows[head * width + j]
            result[head * width + 2 * j + 1] = rows[head * width + j + width // 2]
    return result


@pytest.mark.parametrize("family", gguf_models.OWN)
def test_factors_and_context_are_read_back_to_the_bit(family: str, tmp_path: Path) -> None:
    tensors, _, reader = written(tmp_path, family)
    architecture = contents(reader, "general.architecture")
    names = files.LONGROPE if architecture == "phi3" else (files.ROPE_FREQS,)
    pairs = gguf_models.num_pairs(tmp_path / family)
    assert set(tensors) & {files.ROPE_FREQS, *files.LONGROPE} == set(names)
    for name in names:
        assert np.array_equal(tensors[name], np.asarray(gguf_models.factors(pairs), dtype=np.float32))
    assert contents(reader, f"{architecture}.context_length") == SERVED
    assert contents(reader, f"{architecture}.rope.dimension_count") == 2 * pairs
    # With the type `longrope`, llama.cpp would not ask for the tensor, and refuse the file.
    assert not any("rope.scaling.type" in key for key in reader.fields)


def test_every_weight_of_a_llama_is_where_llama_cpp_looks_for_it(tmp_path: Path) -> None:
    tensors, stored, _ = written(tmp_path, "llama")
    for layer in range(2):
        for name, own in (("q", 4), ("k", 2)):
            rows = interleaved(stored[f"model.layers.{layer}.self_attn.{name}_proj.weight"], own)
            assert np.array_equal(tensors[f"blk.{layer}.attn_{name}.weight"], rows)
        for name, own in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_up", "mlp.up_proj"),
        ):
            assert np.array_equal(tensors[f"blk.{layer}.{name}.weight"], stored[f"model.layers.{layer}.{own}.weight"])
    assert np.array_equal(tensors["output.weight"], stored["lm_head.weight"])
    assert len(tensors) == len(stored) + 1


def test_biases_are_reordered_like_their_weights_and_a_tied_head_is_left_out(tmp_path: Path) -> None:
    tensors, stored, _ = written(tmp_path, "qwen2")
    bias = stored["model.layers.1.self_attn.q_proj.bias"]
    assert np.array_equal(tensors["blk.1.attn_q.bias"], interleaved(bias, 4))
    assert np.array_equal(tensors["blk.1.attn_v.bias"], stored["model.layers.1.self_attn.v_proj.bias"])
    assert "output.weight" not in tensors


def test_experts_are_stacked_in_their_order_and_the_router_stays_exact(tmp_path: Path) -> None:
    tensors, stored, reader = written(tmp_path, "mixtral", weight_type=WeightType.f16)
    for name, own in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        parts = [stored[f"model.layers.1.block_sparse_moe.experts.{e}.{own}.weight"].half() for e in range(4)]
        assert np.array_equal(tensors[f"blk.1.ffn_{name}_exps.weight"], torch.stack(parts).numpy())
    assert np.array_equal(tensors["blk.1.ffn_gate_inp.weight"], stored["model.layers.1.block_sparse_moe.gate.weight"])
    assert contents(reader, "llama.expert_count"), contents(reader, "llama.expert_used_count") == (4, 2)


@pytest.mark.parametrize("weight_type", WeightType)
def test_matrices_are_rounded_once_and_vectors_stay_exact(weight_type: WeightType, tmp_path: Path) -> None:
    tensors, stored, reader = written(tmp_path, "llama", weight_type=weight_type, query_scale=1.3)
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == weight_type.name.upper()
    assert types["blk.0.attn_norm.weight"] == types["rope_freqs.weight"] == "F32"
    norm = stored["model.layers.0.input_layernorm.weight"]
    assert np.array_equal(tensors["blk.0.attn_norm.weight"], norm)
    rows = interleaved(stored["model.layers.0.self_attn.q_proj.weight"] * 1.3, 4).to(weight_type.dtype)
    found = gguf.quants.dequantize(tensors["blk.0.attn_q.weight"], gguf.GGMLQuantizationType[weight_type.name.upper()])
    assert np.array_equal(found, rows.float())
    assert contents(reader, "general.file_type") == weight_type.file_type


def test_only_the_queries_of_a_fused_weight_are_scaled(tmp_path: Path) -> None:
    tensors, stored, reader = written(tmp_path, "phi3", query_scale=1.3)
    fused = stored["model.layers.0.self_attn.qkv_proj.weight"].clone()
    fused[:128] *= 1.3
    assert np.array_equal(tensors["blk.0.attn_qkv.weight"], fused)
    assert contents(reader, "phi3.rope.scaling.attn_factor") == 1.0


def test_the_stored_type_is_the_default(tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    stored = load_file(folder / "model.safetensors")
    save_file({name: each.bfloat16() for name, each in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, gguf_models.factors(16), SERVED)
    types = {each.name: each.tensor_type.name for each in files.read(tmp_path / "model.gguf").tensors}
    assert types["output.weight"] == "BF16"


def test_the_vocabulary_has_a_name_for_every_row(tmp_path: Path) -> None:
    _, _, reader = written(tmp_path, "llama")
    vocabulary = read_vocabulary(reader)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == ROWS
    assert vocabulary.types[VOCAB_SIZE:] == [UNUSED] * (ROWS - VOCAB_SIZE)
    assert UNUSED not in vocabulary.types[:VOCAB_SIZE]
    assert vocabulary.special == {"bos": 0, "eos": 1}
    assert (vocabulary.adds_bos, vocabulary.adds_eos) == (True, False)
    assert contents(reader, "tokenizer.chat_template") == gguf_models.TEMPLATE


@pytest.mark.parametrize("pre", [*token_ids.SPLITS, "pieces"])
def test_the_splitting_regex_is_found_from_the_tokenizer_alone(pre: str, tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / "llama", "llama", gguf_models.tokenizer_for(pre))
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, gguf_models.factors(16), SERVED)
    expected = "default" if pre == "pieces" else pre
    assert contents(files.read(tmp_path / "model.gguf"), "tokenizer.ggml.pre") == expected


def word_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = gguf_models.byte_level()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["normalizer"] = {"type": "Lowercase"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


def other_split() -> PreTrainedTokenizerFast:
    return gguf_models.byte_level(pre_tokenizers.Split(Regex(r"\w+|\W"), behavior="isolated"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (word_level, "tokenizer=WordLevel: llama.cpp's BPE vocabularies alone are written here"),
        (lower_case, "no splitting regex of llama.cpp known here fits it"),
        (other_split, "no splitting regex of llama.cpp known here fits it"),
    ],
)
def test_a_tokenizer_whose_ids_would_change_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / "llama", "llama", make())
    refused(tmp_path, folder, reason)


def test_a_wrong_regex_is_found_when_ids_are_compared() -> None:
    tokenizer = gguf_models.byte_level()
    vocabulary = token_ids.choose_pre(vocabulary_of(tokenizer, ROWS), tokenizer)
    token_ids.verify(vocabulary, tokenizer)
    with pytest.raises(ConfigError, match=r"llama\.cpp would read text differently: other ids for"):
        token_ids.verify(replace(vocabulary, pre="qwen2"), tokenizer)
    tokens = [*vocabulary.tokens]
    tokens[300], tokens[301] = tokens[301], tokens[300]
    with pytest.raises(ConfigError, match=r"llama\.cpp would read text differently: other ids for"):
        token_ids.verify(replace(vocabulary, tokens=tokens), tokenizer)


def refused(tmp_path: Path, folder: Path, reason: str, **changed: Any) -> None:
    """Assert that a model is refused in one line, and that nothing was written."""
    options = {"factors": gguf_models.factors(16), "served_len": SERVED, **changed}
    place = tmp_path / "out"
    place.mkdir()
    with pytest.raises(ConfigError) as error:
        gguf_models.write_gguf(place / "model.gguf", folder, **options)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "own", "reason"),
    [
        ("qwen3", {}, "llama.cpp gives no factors to RoPE in qwen3, and refuses a file that has them"),
        ("gpt_neox", {}, "llama.cpp gives no factors to RoPE in gptneox"),
        ("granite", {}, "the family granite is not written; convert the plain model"),
        ("mistral", {"sliding_window": 100}, "sliding_window=100: llama.cpp attends to all 256 tokens"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: llama.cpp computes silu here"),
    ],
)
def test_models_that_llama_cpp_would_compute_differently_are_refused(
    family: str, own: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    refused(tmp_path, gguf_models.save(tmp_path / family, family, **own), reason)


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ([1.0] * 15, "factors=[15 numbers]: the model rotates 16 pairs of dimensions"),
        ([1.0] * 15 + [0.0], "factors[15]=0.0: should be positive"),
        ([1.0] * 15 + [float("nan")], "factors[15]=nan: should be positive"),
        ([1.0, 1e39] + [1.0] * 14, "factors[1]=1e+39: should be positive and in the range of float32"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: list[float], reason: str, tmp_path: Path) -> None:
    refused(tmp_path, gguf_models.save(tmp_path / "llama"), reason, factors=factors)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    cases = [
        ({**weights, name: weights[name][:-1].contiguous()}, f"{name}=[95, 128]: config.json makes it [96, 128]"),
        ({key: each for key, each in weights.items() if key != name}, "no weights for 1 tensor (blk.1.ffn_up.weight)"),
        ({**weights, "model.adapter": torch.ones(2)}, "1 tensor (model.adapter) have no place"),
        ({**weights, name: weights[name].to(torch.float8_e4m3fn)}, "stored as float8_e4m3fn"),
        ({**weights, name: weights[name] * 1e9}, f"{name}: has values that are not finite in f16"),
    ]
    for number, (changed, reason) in enumerate(cases):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number), folder, reason, weight_type=WeightType.f16)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / "qwen2", "qwen2")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, gguf_models.factors(16), SERVED)
    save_file({**weights, "lm_head.weight": head + 1}, folder / "model.safetensors", {"format": "pt"})
    refused(tmp_path, folder, "lm_head.weight is stored and differs from the embedding")


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    with mounted(tmp_path / "small", "512k") as small:
        monkeypatch.setattr(files, "_published", lambda path: pytest.fail("began to write"))
        with pytest.raises(ConfigError, match=r"output=.*needs 0.00 GiB, and .*small has 0.00 GiB free; make room"):
            gguf_models.write_gguf(small / "model.gguf", folder, gguf_models.factors(16), SERVED)
        assert list(small.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    monkeypatch.setattr(files, "require_space", lambda path, content: None)
    with mounted(tmp_path / "small", "512k") as small:
        with pytest.raises(OSError, match="No space left on device") as error:
            gguf_models.write_gguf(small / "model.gguf", folder, gguf_models.factors(16), SERVED)
        assert error.value.filename == str(small / "model.gguf")
        assert list(small.iterdir()) == []


@pytest.mark.parametrize("place", ["write_tensor_data", "close"])
def test_an_interruption_leaves_the_file_that_was_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_bytes(b"an earlier one")
    calls = []

    def interrupted(writer: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) == 4 or place == "close":
            raise KeyboardInterrupt
        return own(writer, *arguments, **options)

    own = getattr(gguf.GGUFWriter, place)
    monkeypatch.setattr(gguf.GGUFWriter, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf_models.write_gguf(out / "model.gguf", folder, gguf_models.factors(16), SERVED)
    assert [each.name for each in out.iterdir()] == ["model.gguf"]
    assert (out / "model.gguf").read_bytes() == b"an earlier one"


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_models.save(tmp_path / "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, folder, "format=gguf: needs the package gguf: pip install -r requirements-export.txt")
