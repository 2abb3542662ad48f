"""Checkpoints of the original CLEX code: evaluation, further training, and bitwise export."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from clex_train.cli import evaluate
from clex_train.cli import export as program
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import Activation, LogScale, ScalingConfig
from clex_train.console import program as console
from clex_train.data.position_sampling import draw_batch
from clex_train.export.final import write_final
from clex_train.export.official import write_official
from clex_train.models import architecture, load
from clex_train.models import directory as model_directory
from clex_train.models.official_field import official_rope_scaling, official_tensors
from clex_train.models.tokenizer import load_tokenizer
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.token_store.writer import write_store
from clex_train.training.ode_optimizer import OdeOptimizer
from tests.export.official_directories import official_directory, save_tokenizer
from tests.helpers.golden_subset import SUBSET, stored_lengths

VOCAB_SIZE = json.loads((SUBSET / "clex_llama.config.json").read_text())["vocab_size"]

# Three times the float32 error of the original code, by number of tokens (see the README of the goldens).
TOLERANCE = {32: 3e-5, 64: 3e-5, 65: 3e-5, 128: 9e-5, 200: 9e-5, 512: 4.2e-4, 1000: 1.05e-3}
LOG_SCALED_TOLERANCE = {n: max(3 * 5e-3 * n / 1000, tolerance) for n, tolerance in TOLERANCE.items()}


@pytest.fixture
def directory(tmp_path: Path, goldens: Path) -> Path:
    return official_directory(tmp_path / "official", goldens)


def training_config(directory: Path, **scaling: object) -> Config:
    settings = {"name": Method.clex, "t_max": 16.0, "act": Activation.tanh, "lr_scale": 1.0, **scaling}
    config = Config(model=ModelConfig(path=str(directory)), scaling=ScalingConfig(**settings))
    config.engine.zero_stage = 0
    return config


def load_for_training(config: Config) -> load.LoadedModel:
    return load.load_for_training(config, architecture.to_train(config.model), torch.float32, {})


@pytest.mark.parametrize("log_scale", [False, True])
@torch.no_grad()
def test_evaluation_matches_the_logits_of_the_original_code(
    tmp_path: Path, logit_goldens: Path, log_scale: bool
) -> None:
    directory = official_directory(tmp_path / "official", logit_goldens, log_scale=log_scale)
    loaded = load.load_for_evaluation(ModelConfig(path=str(directory)))
    expected = load_file(logit_goldens / "clex_eval_tanh.safetensors")
    assert loaded.context_len == 64
    assert loaded.log_scale is (LogScale.official if log_scale else LogScale.off)
    for length in stored_lengths(expected):
        tolerance = (LOG_SCALED_TOLERANCE if log_scale else TOLERANCE)[length]
        logits = loaded.model(expected["input_ids"][None, :length], use_cache=False).logits[0]
        name = f"tanh.log{int(log_scale)}.{length}.logits"
        rows = slice(None) if len(expected[name]) == length else expected[f"rows.{length}"]
        assert torch.allclose(logits[rows], expected[name], atol=tolerance, rtol=0), f"N={length}"


def test_converting_from_official_and_back_keeps_every_bit(directory: Path, tmp_path: Path) -> None:
    loaded = load_for_training(training_config(directory))
    loaded.tokenizer = load_tokenizer(str(directory), ModelConfig())
    loaded.solve_table()
    write_final(tmp_path / "final", loaded, loaded.model.state_dict(), loaded.tokenizer)
    record = model_directory.read_record(tmp_path / "final")
    assert record.official_ntk_base
    assert record.t_max == 16.0
    ours = load.load_for_evaluation(ModelConfig(path=str(tmp_path / "final")), dtype="auto")
    write_official(tmp_path / "again", ours)
    given, written = (load_file(folder / "model.safetensors") for folder in (directory, tmp_path / "again"))
    assert given.keys() == written.keys()
    for name, tensor in given.items():
        if not name.endswith("clex_layer.inv_freq"):
            assert torch.equal(written[name], tensor), name
    buffer = "model.clex_layer.inv_freq"
    assert torch.allclose(written[buffer], given[buffer].float(), rtol=1e-6, atol=0)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (directory, tmp_path / "again"))
    for key in ("rope_scaling", "rope_theta", "log_scale", "max_position_embeddings", "architectures"):
        assert after[key] == before[key], key


def test_lengths_beyond_the_checkpoint_are_refused_before_weights_are_read(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("weights were read"))
    documents = [[2 + i % (VOCAB_SIZE - 2) for i in range(1500)]]
    write_store(tmp_path / "store", {"train": documents, "validation": documents}, VOCAB_SIZE)
    save_tokenizer(tmp_path / "store" / "tokenizer", VOCAB_SIZE)
    save_tokenizer(directory, VOCAB_SIZE)
    arguments = [f"model={directory}", f"data={tmp_path / 'store'}", "lengths=[64,1088]"]
    assert call(monkeypatch, *arguments, program=evaluate) == console.USER_ERROR
    assert "num_tokens=1088: beyond t_max * L = 16 * 64" in capsys.readouterr().err


def test_an_official_checkpoint_that_is_not_a_directory_must_be_downloaded(directory, monkeypatch) -> None:
    monkeypatch.setattr("clex_train.models.official.is_official", lambda path: False)
    with pytest.raises(ValueError, match="a checkpoint of the original CLEX code: download it"):
        architecture.to_train(ModelConfig(path=str(directory)))


@pytest.mark.parametrize("family", ["phi", "mixtral", "gpt_neox"])
@torch.no_grad()
def test_an_exported_directory_of_any_family_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "official"
    save_base(family, base)
    model = load.load_for_evaluation(ModelConfig(path=str(base)))
    model.clex = Clex(model.base_inv_freq, t_max=4.0, act="tanh", official_ntk_base=True)
    torch.nn.init.normal_(model.clex.down, std=0.3, generator=torch.Generator().manual_seed(1))
    model.solve_table()
    write_official(folder, model)
    ids = torch.arange(40)[None]
    again = load.load_for_evaluation(ModelConfig(path=str(folder)))
    assert torch.allclose(again.model(ids).logits, model.model(ids).logits, atol=1e-6, rtol=0)
    assert torch.equal(again.base_inv_freq, model.base_inv_freq)
    plain = load.load_for_evaluation(ModelConfig(path=str(base))).model(ids).logits
    assert not torch.allclose(plain, again.model(ids).logits, atol=1e-3)


def test_experts_are_written_under_the_names_of_the_original_code(tmp_path: Path) -> None:
    save_base("mixtral", tmp_path / "base")
    loaded = load.load_for_evaluation(ModelConfig(path=str(tmp_path / "base")))
    loaded.clex = Clex(loaded.base_inv_freq, t_max=4.0, official_ntk_base=True)
    write_official(tmp_path / "official", loaded)
    names = set(load_file(tmp_path / "official" / "model.safetensors"))
    assert {f"model.layers.1.block_sparse_moe.experts.3.{part}.weight" for part in ("w1", "w2", "w3")} <= names
    assert "model.clex_layer.proj_func.ode_up_proj" in names


def save_base(family: str, folder: Path) -> None:
    settings: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "rope_theta": 1e6 if family == "mixtral" else 1e4,
    }
    settings |= {"num_key_value_heads": 1, "num_local_experts": 4} if family == "mixtral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, 61)


def test_sharded_directories_have_the_field_in_a_separate_file(directory: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("clex_train.export.official.SHARD_SIZE", "1MB")
    loaded = load.load_for_evaluation(ModelConfig(path=str(directory)))
    write_official(tmp_path / "sharded", loaded)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.clex_layer.proj_func.ode_up_proj"] == "model-clex.safetensors"
    again = load.load_for_evaluation(ModelConfig(path=str(tmp_path / "sharded")))
    ids = torch.arange(200)[None] % VOCAB_SIZE
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


def test_training_continues_from_the_trained_field(directory: Path, tmp_path: Path) -> None:
    config = training_config(directory)
    loaded = load_for_training(config)
    assert loaded.clex is not None
    start = loaded.clex.down.detach().clone()
    assert torch.equal(start, load_file(directory / "model.safetensors")["model.clex_layer.proj_func.ode_down_proj"])
    assert loaded.clex.official_ntk_base
    ode = OdeOptimizer(loaded.clex, config.scaling, seed=0)
    adamw = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(4):
        spectrum = ode.begin(step)
        positions = draw_batch(
            "mix", [0, 1], seq_len=64, context_len=64, t=spectrum.t, seed=0, mix_random=0.25, max_chunks=8
        )
        with loaded.handle.training(spectrum, positions):
            loss = loaded.model(input_ids=ids, labels=ids).loss
            loss.backward()
        adamw.step()
        adamw.zero_grad()
        assert ode.finish(1e-3) > 0
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(loaded.clex.down, start)
    loaded.solve_table()
    write_official(tmp_path / "tuned", loaded)
    written = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.equal(written["model.clex_layer.proj_func.ode_down_proj"], loaded.clex.down)


@pytest.mark.parametrize(
    ("facts", "scaling", "message"),
    [
        ({}, {"act": Activation.silu}, "scaling.act=silu: .* has tanh; set that"),
        ({}, {"param_factor": 2.0}, r"scaling.param_factor=2\.0: .* has 1; set that"),
        ({"log_scale": True}, {"log_scale": LogScale.eval}, "scaling.log_scale=eval: .* was made for .*official"),
    ],
)
def test_a_key_that_contradicts_the_checkpoint_is_refused_in_one_line(
    tmp_path, goldens, facts, scaling, message
) -> None:
    directory = official_directory(tmp_path / "official", goldens, **facts)
    with pytest.raises(ValueError, match=message) as refusal:
        load_for_training(training_config(directory, **scaling))
    assert "\n" not in str(refusal.value)


def test_log_scaling_and_the_ntk_base_come_from_the_checkpoint(tmp_path: Path, goldens: Path) -> None:
    directory = official_directory(tmp_path / "official", goldens, log_scale=True)
    loaded = load_for_training(training_config(directory))
    assert loaded.log_scale is LogScale.official
    assert loaded.clex is not None
    assert loaded.clex.official_ntk_base


def test_a_larger_t_max_continues_the_same_field_to_longer_contexts(directory: Path) -> None:
    loaded = load_for_training(training_config(directory, t_max=24.0))
    table = loaded.solve_table()
    assert table is not None
    assert table.t_max == 24.0
    assert official_rope_scaling(loaded.clex)["max_factor"] == 24


def test_another_context_length_is_refused_before_weights_are_read(directory: Path) -> None:
    model = ModelConfig(path=str(directory), context_len=128)
    with pytest.raises(ValueError, match=r"model\.context_len=128: the CLEX of .* belongs to a base of 64 tokens"):
        architecture.context_length(model, architecture.to_train(model))


def test_models_that_the_layout_cannot_represent_are_refused(directory: Path, tmp_path: Path) -> None:
    loaded = load.load_for_evaluation(ModelConfig(path=str(directory)))
    loaded.log_scale = LogScale.eval
    with pytest.raises(ValueError, match="log_scale=eval: the official layout knows `off` and `official`"):
        write_official(tmp_path / "out", loaded)
    loaded.clex = None
    with pytest.raises(ValueError, match="no CLEX field"):
        write_official(tmp_path / "out", loaded)
    assert not (tmp_path / "out").exists()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, program: ModuleType = program) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    return console.run(program.main, program.usage)


def test_the_evaluate_program_accepts_an_official_directory(directory, tmp_path, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (300, 280)]
    write_store(tmp_path / "store", {"train": documents, "validation": documents}, VOCAB_SIZE)
    save_tokenizer(tmp_path / "store" / "tokenizer", VOCAB_SIZE)
    arguments = [f"model={directory}", f"data={tmp_path / 'store'}", "lengths=[64,256]", "methods=[trained,ntk]"]
    output = tmp_path / "result.json"
    assert call(monkeypatch, *arguments, f"output={output}", "precision=fp32", program=evaluate) == 0
    scores = json.loads(output.read_text())["scores"]
    assert [(s["frequencies"], s["length"], s["t"]) for s in scores[:2]] == [("clex", 64, 1.0), ("clex", 256, 4.0)]


def test_the_program_writes_what_the_function_writes(directory, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "exports" / "mine"
    assert call(monkeypatch, f"model={directory}", "format=official", f"output={output}") == 0
    assert f"written to {output}" in capsys.readouterr().out
    given, written = (load_file(folder / "model.safetensors") for folder in (directory, output))
    assert torch.equal(
        given["model.layers.0.self_attn.q_proj.weight"], written["model.layers.0.self_attn.q_proj.weight"]
    )
    assert (output / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output={new}"], "run: name either run=FOLDER or model=DIR"),
        (["model={official}"], "output: name the directory to write"),
        (["model={official}", "output={official}"], "exists already"),
        (["model={new}", "output={new}", "format=official"], "no directory with a CLEX field"),
        (["run={official}", "output={new}"], "no final/ in it"),
        (["model={official}", "output={new}", "format=onnx"], "format"),
        (["model={official}", "output={new}", "format=official", "log_scale=eval"], "log_scale=eval"),
        (["model={official}", "output="], "output: name the directory to write"),
        (["model={official}", "output={official}/config.json/x"], "config.json is a file, not a folder"),
        (["model={official}", "output=/proc/nope/x"], "error: output=/proc/nope/x: /proc "),
        (["model={official}", "output={new}/" + "x" * 250], "a name of more than 255 bytes"),
        (
            ["model={trained}", "output={new}", "format=official"],
            "log_scale=eval: the official layout knows `off` and `official`",
        ),
    ],
)
def test_bad_input_of_the_program_is_refused_in_one_line(
    directory, tmp_path, monkeypatch, capsys, arguments, message
) -> None:
    places = {"official": directory, "new": tmp_path / "new", "trained": tmp_path / "trained"}
    places["trained"].mkdir()
    clex = Clex(torch.ones(4, dtype=torch.float64), t_max=2.0)
    model_directory.write_clex(places["trained"], clex, clex.table(scale_grid(2.0)), 64, LogScale.eval)
    monkeypatch.setattr(load, "load_for_evaluation", lambda *_, **__: pytest.fail("weights were read"))
    assert call(monkeypatch, *(argument.format(**places) for argument in arguments)) == console.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_help_names_every_key(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for key in program.ExportConfig.__dataclass_fields__:
        assert f"\n  {key} (" in printed


def test_the_tensors_are_under_the_body_of_the_model() -> None:
    clex = Clex(torch.ones(4, dtype=torch.float64), t_max=2.0)
    assert set(official_tensors(clex, "gpt_neox.")) == {
        "gpt_neox.clex_layer.proj_func.ode_up_proj",
        "gpt_neox.clex_layer.proj_func.ode_down_proj",
        "gpt_neox.clex_layer.inv_freq",
    }
