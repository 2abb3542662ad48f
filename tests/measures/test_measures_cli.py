"""Measures in the evaluate program and in a training run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from clex_train.cli import evaluate as program
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.measures import Measure
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.evaluation import results
from clex_train.measures.during_training import TrainingEvaluation
from clex_train.models.load import LoadedModel
from clex_train.rope.patch import install_rotary
from clex_train.token_store.store import TokenStore
from tests.measures.forced_models import ForcedLlama, text_store
from tests.retrieval import copying_llama
from tests.retrieval.local_tokenizers import byte_level

PROMPTS = ["measures=[forced_passkey,repetition]", "task_lengths=[160]", "depths=[0,1]", "num_prompts=2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a model with its tokenizer, and a store of text."""
    root, tokenizer = tmp_path_factory.mktemp("measures"), byte_level()
    LlamaForCausalLM(copying_llama.build(len(tokenizer)).config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    text_store(tokenizer, root / "store")
    return {"model": str(root / "base"), "store": str(root / "store")}


def call(monkeypatch: pytest.MonkeyPatch, places: dict[str, str], *arguments: str) -> int:
    given = [f"model={places['model']}", f"data={places['store']}", "precision=fp32", "methods=[none,ntk]"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, *arguments])
    return console.run(program.main, program.usage)


def test_the_program_prints_and_writes_measures(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "measures.json"
    assert call(monkeypatch, places, *PROMPTS, "protocols=[]", "lengths=[128]", f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "forced_passkey: percent of prompts whose answer tokens are all the most likely ones; 2 prompts" in printed
    assert "ntk, distance 64" in printed
    content = json.loads(output.read_text())
    quantities = ("forced_passkey_exact", "forced_passkey_nll", "forced_passkey_gap")
    quantities += ("repetition_nll", "repetition_baseline", "repetition_gain")
    assert set(content["metrics"]) == {f"{name}/{method}/160" for name in quantities for method in ("none", "ntk")}
    assert content["request"]["measures"] == ["forced_passkey", "repetition"]
    read, _ = results.read(output)
    assert len(read.measures) == len(content["measures"]) == 2 * (2 * 3 + 1 * 3)
    assert read.metrics() == content["metrics"]


def test_a_dry_run_counts_the_forwards_of_measures(places, monkeypatch, capsys) -> None:
    more = ["protocols=[]", "lengths=[128]", "chunk_len=64", "batch_tokens=64", "dry_run=true"]
    assert call(monkeypatch, places, *PROMPTS, *more) == 0
    printed = capsys.readouterr().out
    assert "4, of which 0 equal others" in printed
    # 8 and 4 rows under two methods, each in three chunks and the answer.
    assert f"{2 * (8 + 4) * (3 + 1)} on each of 1 ranks" in printed


def test_measures_are_refused_where_they_cannot_run(places, monkeypatch, capsys) -> None:
    for arguments, message in (
        (["measures=[forced_passkey]", "task_lengths=[20]"], "task_lengths=20: forced_passkey needs at least "),
        (["measures=[forced_passkey]", "distances=[64]"], "distances=[64]: only repetition has distances"),
        (["measures=[repetition]", "distances=[0]"], "distances=[0]: one or more distances"),
        (["measures=[repetition]", "protocols=[streaming]", "methods=[none]"], "evaluate measures separately"),
    ):
        assert call(monkeypatch, places, "lengths=[128]", *arguments) == console.USER_ERROR
        assert message in capsys.readouterr().err


def test_a_training_run_evaluates_the_configured_measures(places: dict[str, str], tmp_path: Path) -> None:
    tokenizer: Any = byte_level()
    settings = {"task_lengths": [160], "depths": [0.0, 1.0], "num_prompts": 2}
    spec = EvaluationConfig(lengths=[128], measures=[Measure.forced_passkey], num_windows=1, **settings)
    config = Config(model=ModelConfig(path=places["model"]), evaluation=spec, output_dir=str(tmp_path))
    model = copying_llama.build(len(tokenizer), make=ForcedLlama)
    loaded = LoadedModel(model, install_rotary(model, copying_llama.CONTEXT_LEN), copying_llama.CONTEXT_LEN)
    store = TokenStore(places["store"])
    evaluation = TrainingEvaluation(config, store, store.split("validation"), copying_llama.CONTEXT_LEN, tokenizer)
    metrics = evaluation(loaded, step=7)
    assert metrics["forced_passkey_exact/trained/160"] == 1
    assert metrics["forced_passkey_gap/trained/160"] > 1
    read, _ = results.read(tmp_path / "evaluation" / "step_7.json")
    assert len(read.measures) == 6
