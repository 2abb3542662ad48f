"""Whole runs with adapters in one process: what is trained, written, resumed and refused."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from clex_train.adapters import lora
from clex_train.checkpoint import weights as stored_weights
from clex_train.config.model import ModelConfig
from clex_train.export import average
from clex_train.models import load
from clex_train.training import loop
from clex_train.utils.errors import ConfigError, StopRequested
from tests.helpers.same_models import assert_same_model

peft = pytest.importorskip("peft")

SHORT = ("evaluation=never", "optim.batch_rows=2", "optim.steps=4", "optim.lr=1e-2", "checkpoint.every=2")
CLEX = ("scaling=clex", "scaling.t_max=4", "scaling.log_scale=off", "scaling.lr_scale=1")
FINAL = "model.safetensors"
LONGLORA = ("adapter=longlora", "adapter.dropout=0.1")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_store) -> Path:
    """Save pretrained weights with the vocabulary of the store, L = 32, untied."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_store.parent / "tokenizer")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_run, base):
    """Return a function that trains over `base` in a folder."""

    def start(folder: Path, *overrides: str) -> Path:
        given = (f"model.path={base}", "model.config=null", "model.init=pretrained")
        train.run(tiny_run(folder, *SHORT, *CLEX, *given, *LONGLORA, *overrides))
        return folder

    return start


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """Train with LongLoRA's set under ZeRO-3, the weights sharded while they are read."""
    return run(tmp_path_factory.mktemp("runs") / "whole", "engine.zero_stage=3", "adapter.save=true")


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_the_final_model_is_merged_in_the_layout_of_full_tuning(finished, base):
    before, after = (load_file(folder / FINAL) for folder in (base, finished / "final"))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name or "norm" in name or "embed_tokens" in name}
    assert type(AutoModelForCausalLM.from_pretrained(finished / "final")) is LlamaForCausalLM
    assert not list((finished / "final").glob("adapter_*")), "transformers would take the directory for an adapter"


def test_the_field_is_trained_beside_the_adapters(finished):
    loaded = load.load_for_evaluation(ModelConfig(path=str(finished / "final")))
    assert float(loaded.clex.residual([4.0])) > 1e-4


def test_the_adapter_on_its_base_is_the_merged_model(finished, base):
    stated = json.loads((finished / "final/adapter/adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(base)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), finished / "final" / "adapter")
    merged = load_file(finished / "final" / FINAL)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6, msg=name)


def test_checkpoints_hold_the_trained_parameters_alone(finished, base):
    size = sum(path.stat().st_size for path in (finished / "checkpoints" / "step_4").glob("*.pt"))
    trained = sum(tensor.numel() for tensor in load_file(finished / "final/adapter/adapter_model.safetensors").values())
    assert 12 * trained < size < 12 * trained + 4e4
    model, *_ = stored_weights._load(stored_weights.newest(finished / "checkpoints", 1)[0], stored_weights.MODEL)
    frozen = [name for name in model["module"] if "lora_" not in name and "norm" not in name and "embed" not in name]
    assert frozen == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_stopped_run_resumes_to_the_bit(run, finished, stage, tmp_path, monkeypatch):
    chosen = f"engine.zero_stage={stage}"
    whole = finished if stage == 3 else run(tmp_path / "whole", chosen)
    real = loop.train_step

    def stops(parts, step, micro_batches):
        if step == 3:
            raise StopRequested("enough")
        return real(parts, step, micro_batches)

    monkeypatch.setattr(loop, "train_step", stops)
    with suppress(StopRequested):
        run(tmp_path / "parted", chosen)
    monkeypatch.setattr(loop, "train_step", real)
    assert losses(tmp_path / "parted") == losses(whole)[:3]
    run(tmp_path / "parted", chosen)
    assert losses(tmp_path / "parted") == losses(whole)
    assert_same_model(tmp_path / "parted" / "final", whole / "final")


def test_a_finished_run_writes_its_adapter_when_it_is_asked_later(run, finished, tmp_path):
    folder = run(tmp_path / "later", "engine.zero_stage=3")
    assert not (folder / "final" / "adapter").exists()
    before = losses(folder)
    run(folder, "engine.zero_stage=3", "adapter.save=true")
    assert losses(folder) == before
    for place in ("final", "final/adapter"):
        for path in (finished / place).glob("*.safetensors"):
            one, other = load_file(path), load_file(folder / place / path.name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_adapter_or_base_cannot_continue_a_run(run, finished, base, tmp_path):
    folder = tmp_path / "unfinished"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "final")
    changes = (
        ("adapter.r=4",),
        ("adapter.dropout=0",),
        ("adapter.train_norms=false",),
        ("adapter=none", "adapter.dropout=0"),
    )
    for change in changes:
        with pytest.raises(ConfigError, match="it holds a model of another architecture or adapter"):
            run(folder, "engine.zero_stage=3", *change)
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / FINAL)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "other" / FINAL, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.path=.*other: its weights are not those below the adapters"):
        run(folder, "engine.zero_stage=3", f"model.path={tmp_path / 'other'}")
    # The same weights in another place are the same base.
    shutil.copytree(base, tmp_path / "moved")
    run(folder, "engine.zero_stage=3", f"model.path={tmp_path / 'moved'}")
    assert_same_model(folder / "final", finished / "final")


def test_the_mean_of_checkpoints_is_refused(finished):
    with pytest.raises(ConfigError, match="hold adapters alone"):
        average.plan(finished, 2)


def test_a_quantised_base_is_refused_with_reason_and_remedy(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "packed")
    facts = json.loads((base / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"adapter\.name=lora: .*QLoRA.*rounded again.*bfloat16"):
        run(tmp_path / "run", f"model.path={tmp_path / 'packed'}")


def test_settings_without_an_adapter_are_refused(tiny_run, tmp_path):
    for setting in ("adapter.r=64", "adapter.save=true", "adapter.targets=[q_proj]"):
        with pytest.raises(ConfigError, match=r"adapter\..*adapter=none trains every weight"):
            tiny_run(tmp_path / "run", setting)


def test_dropout_in_tiled_mlps_is_refused_before_weights_are_read(run, tmp_path):
    tiled = ("engine.tiled_mlp=8", "adapter.targets=[all-linear]")
    with pytest.raises(ConfigError, match=r"adapter\.dropout=0\.1: engine\.tiled_mlp"):
        run(tmp_path / "run", *tiled)
    assert not (tmp_path / "run").exists()


def test_a_missing_peft_is_refused_with_the_command_that_installs_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft is not installed: pip install .*adapters"):
        run(tmp_path / "run")
    run(tmp_path / "full", "adapter=none", "adapter.dropout=0")


def test_the_opening_block_says_rank_layers_and_share(run, finished, tmp_path, capsys):
    run(tmp_path / "run", "optim.steps=1", "checkpoint.every=0")
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    at = next(index for index, line in enumerate(lines) if line.startswith("adapter"))
    assert lines[at].endswith(
        "lora, rank 8, alpha 16, dropout 0.1, on k_proj, o_proj, q_proj, v_proj; embeddings and norms trained whole"
    )
    adapter, model = (load_file(finished / "final" / name) for name in ("adapter/adapter_model.safetensors", FINAL))
    trained = sum(tensor.numel() for tensor in adapter.values())
    total = sum(tensor.numel() for name, tensor in (adapter | model).items() if "lora_" in name or name in model)
    assert lines[at + 1].startswith(f"{trained:,} of {total:,} parameters are trained (37 %)")
