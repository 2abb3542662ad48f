"""Refusals of train.py: one line with the key, before a model is built or a process group opened."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BloomConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

import train
from clex_train.checkpoint.manifest import Manifest
from clex_train.console.errors import explain
from clex_train.engine import deepspeed as engines
from clex_train.token_store import vocabulary
from clex_train.utils import distributed
from tests.helpers.composing import composed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refusal(tmp_path, tiny_run, monkeypatch):
    """Return a function that gives the refusal of a run with overrides, before it opens a process group."""

    def too_late(*_):
        raise AssertionError("the process group was opened before the input was refused")

    monkeypatch.setattr(engines, "open_process_group", too_late)

    def line(*overrides: str) -> str:
        config = tiny_run(tmp_path / "run", *overrides)
        with pytest.raises(ValueError) as raised:  # noqa: PT011  the tests compare the message
            train.run(config)
        text = explain(raised.value)
        assert text is not None, raised.value
        assert "\n" not in text
        return text

    return line


def test_rows_longer_than_the_store_are_refused(refusal):
    assert refusal("data.seq_len=100000000").startswith("data.seq_len=100000000: ")


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        ("[trained,clex]", "methods=['trained', 'clex']: this model holds no CLEX"),
        ("[longrope]", "evaluation.longrope_factors: model_type=llama has no longrope factors"),
    ],
)
def test_an_evaluation_method_unsupported_by_the_model_is_refused(refusal, methods, line):
    assert refusal(f"evaluation.methods={methods}", "evaluation.every=0").startswith(line)


def test_a_store_of_another_tokenizer_is_refused(refusal, tmp_path, tiny_store):
    other = tmp_path / "other_tokenizer"
    command = [sys.executable, "-m", "data_prep", "train_tokenizer", f"corpus.paths=[{tiny_store.parent / 'texts'}]"]
    subprocess.run([*command, f"output={other}", "vocab_size=400"], cwd=ROOT, check=True, timeout=600)
    line = refusal(f"model.tokenizer={other}")
    assert str(tiny_store) in line
    assert "tokenizer" in line


def test_a_missing_store_is_refused(refusal):
    assert "/no/such/store" in refusal("data.path=/no/such/store")


def test_a_missing_model_directory_is_refused(refusal):
    line = refusal("model.init=pretrained", "model.path=/no/such/model")
    assert line == "model.path=/no/such/model: no such directory; give a model directory or a hub name owner/model"


@pytest.mark.parametrize(("config", "kind"), [(GPT2Config(n_layer=1), "gpt2"), (BloomConfig(n_layer=1), "bloom")])
def test_models_without_rope_are_refused(refusal, tmp_path, config, kind):
    config.save_pretrained(tmp_path / kind)
    line = refusal(f"model.config={tmp_path / kind}")
    assert line.startswith(f"model_type={kind}: no rotary position embedding")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="root may write everywhere but in /proc")
def test_an_unwritable_output_directory_is_refused(refusal):
    assert refusal("output_dir=/proc/clex").startswith("output_dir=/proc/clex: cannot be written")


def test_windows_longer_than_every_held_out_document_are_refused(refusal):
    assert refusal("evaluation.lengths=[32,33554432]").startswith("evaluation.lengths=33554432: none of the ")


def test_evaluation_beyond_t_max_is_refused(refusal):
    line = refusal("scaling=clex", "scaling.t_max=4", "evaluation.lengths=[32,256]")
    assert "scaling.t_max" in line


def test_an_indivisible_batch_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert refusal("optim.batch_rows=8", "engine.micro_batch=1").startswith("optim.batch_rows=8: must be a multiple")


def test_a_checkpoint_of_another_architecture_is_refused(refusal, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_5"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(Manifest(5, 40, 1, 3, "another", "").render())
    line = refusal()
    assert line.startswith(f"checkpoint {folder}: ")
    assert "architecture" in line


def test_evaluation_on_training_documents_is_refused(refusal, tmp_path, tiny_store):
    texts, other = tiny_store.parent / "texts", tmp_path / "other"
    command = [sys.executable, "-m", "data_prep", "tokenize", f"corpus.paths=[{texts}]", "corpus.validation_share=1"]
    command += [f"tokenizer={tiny_store / 'tokenizer'}", f"output={other}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    line = refusal(f"evaluation.path={other}")
    assert line.startswith(f"evaluation.path={other}: ")
    assert ".txt: record 1, in training" in line
    assert "choose another store with evaluation.path" in line


def test_an_unreadable_mixture_is_refused(refusal, tiny_store):
    evaluated = f"evaluation.path={tiny_store}"
    line = refusal("data.path=null", f"+data.domains={{a: {{path: {tiny_store}}}, b: {{path: /no/such}}}}", evaluated)
    assert line.startswith("data.domains.b.path=/no/such: no such directory")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.path=x", "+data.domains={a: {path: y}}"], "data.path=x: one store or several"),
        (["data.path=null", "+data.domains={a: {path: y}}"], "evaluation.path: a mixture has no validation split"),
        (["data.path=null", "+data.domains={a: {weight: 2}}"], "data.domains.a.path: name the token store"),
        (["data=longcorpus", "+data.domains.qa.wieght=2"], "data.domains.qa.wieght: no such key"),
    ],
)
def test_invalid_settings_of_a_mixture_are_refused(overrides, line):
    with pytest.raises((ValueError, HydraException)) as raised:
        composed("+experiment=tiny_base", *overrides)
    assert explain(raised.value).startswith(line)


def test_rows_longer_than_every_document_are_refused(refusal):
    line = refusal("data.packing=long_documents", "data.min_document_tokens=9999999")
    assert line.startswith("data.min_document_tokens=9999999: none of the ")


def test_skipping_more_rows_than_exist_is_refused(refusal):
    assert refusal("data.skip_rows=[0-99999999]").startswith(
        "data.skip_rows=['0-99999999']: skips 100000000 rows, but one"
    )


@pytest.fixture
def base(tmp_path, tiny_store):
    """Save a user's model of L = 64 with the tokenizer of the store."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    arch = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(arch).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_store / "tokenizer").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


OWN_LENGTH = ("model.context_len=null", "scaling=clex", "scaling.t_max=4")


def test_the_length_is_that_of_the_path_and_not_of_the_preset(refusal, base):
    line = refusal(f"model.path={base}", *OWN_LENGTH, "evaluation.lengths=[64,512]")
    assert line.startswith(
        "evaluation.lengths=[64, 512]: beyond scaling.t_max * L = 4 * 64 = 256 tokens; raise scaling.t_max"
    )


def test_random_weights_are_refused_for_a_path_with_weights(refusal, base):
    line = refusal(f"model.path={base}", "model.init=random")
    assert line.startswith(f"model.init=random: the weights of model.path={base} would be ignored")


def test_weights_of_another_model_are_refused(refusal, base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    line = refusal(f"model.path={base}", *OWN_LENGTH)
    assert "its weights lack 1 tensor (model.layers.1.mlp.up_proj.weight)" in line


def test_ids_outside_the_embedding_are_refused(refusal, base):
    config = LlamaConfig.from_pretrained(base)
    config.vocab_size = 300
    LlamaForCausalLM(config).save_pretrained(base)
    line = refusal(f"model.path={base}", *OWN_LENGTH)
    assert re.match(r"data\.path=.*: it has the id \d+, but the embedding of .*base has 300 rows", line)


@pytest.mark.parametrize("key", ["data", "evaluation"])
def test_held_out_ids_outside_the_embedding_are_refused(refusal, base, tiny_store, monkeypatch, key):
    """Use a store whose training documents have no such ids."""
    monkeypatch.setattr(vocabulary, "check_embedding", lambda *_: None)
    config = LlamaConfig.from_pretrained(base)
    config.vocab_size = 300
    LlamaForCausalLM(config).save_pretrained(base)
    line = refusal(f"model.path={base}", *OWN_LENGTH, f"{key}.path={tiny_store}")
    assert re.match(rf"{key}\.path=.*: it has the id \d+, but the embedding of .*base has 300 rows", line)


def test_a_base_without_its_tokenizer_is_refused(refusal, base):
    for file in base.glob("tokenizer*"):
        file.unlink()
    line = refusal(f"model.path={base}", *OWN_LENGTH)
    assert line.startswith(f"{base}: no tokenizer in it (tokenizer.json or tokenizer.model")
    assert "model.tokenizer=DIR" in line


def test_an_unreadable_tokenizer_is_refused(refusal, base):
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    line = refusal(f"model.path={base}", *OWN_LENGTH)
    assert line.startswith(f"{base}: no readable tokenizer (")
    assert not line.endswith(":)")
