"""Retrieval as a user asks for it: of the evaluate program, and in a training run."""

import json
import sys
from pathlib import Path
from typing import Any

import copying_llama
import pytest
from text_stores import write_text_store
from transformers import LlamaForCausalLM

from clex_train.cli import console
from clex_train.cli import evaluate as program
from clex_train.config import Config
from clex_train.data.store import TokenStore
from clex_train.evaluation import results
from clex_train.evaluation.training import TrainingEvaluation
from clex_train.modeling import LoadedModel
from clex_train.rope import growing
from clex_train.rope.patch import install_rotary
from clex_train.settings.evaluation import EvaluationConfig
from clex_train.settings.model import ModelConfig
from clex_train.settings.retrieval import Task

TEXT = "It rained all night. In the morning the river had risen, and nobody crossed the bridge. " * 60


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> dict[str, str]:
    """A model with its tokenizer, and a store of text."""
    root = tmp_path_factory.mktemp("retrieval")
    LlamaForCausalLM(copying_llama.build(len(byte_tokenizer)).config).save_pretrained(root / "base")
    byte_tokenizer.save_pretrained(root / "base")
    write_text_store(root / "store", [TEXT, TEXT[500:]], byte_tokenizer)
    return {"model": str(root / "base"), "store": str(root / "store")}


def call(monkeypatch: pytest.MonkeyPatch, places: dict[str, str], *arguments: str) -> int:
    given = [f"model={places['model']}", f"data={places['store']}", "precision=fp32", "methods=[none,ntk]"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, *arguments])
    return console.run(program.main, program.usage)


def test_the_program_asks_prompts_alone_and_keeps_the_rows(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "tasks.json"
    asked = ["tasks=[passkey]", "protocols=[]", "lengths=[256,512]", "depths=[0,1]", "num_prompts=2"]
    assert call(monkeypatch, places, *asked, f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "passkey, ntk: percent of 2 prompts answered" in printed
    content = json.loads(output.read_text())
    assert [tuple(row) for row in content["tasks"]] == [
        ("task", "method", "length", "depth", "correct", "total", "score", "seed", "prompts")
    ] * 8
    assert [(row["method"], row["length"], row["depth"]) for row in content["tasks"][:3]] == [
        ("none", 256, 0.0),
        ("none", 256, 1.0),
        ("none", 512, 0.0),
    ]
    assert set(content["metrics"]) == {f"passkey/{m}/{n}" for m in ("none", "ntk") for n in (256, 512)}
    read, _ = results.read(output)
    assert [vars(row) for row in read.tasks] == content["tasks"]


def test_tasks_stand_beside_perplexity_and_have_lengths_of_their_own(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "both.json"
    asked = ["tasks=[passkey]", "lengths=[128]", "task_lengths=[300]", "depths=[0.5]", "num_prompts=1"]
    assert call(monkeypatch, places, *asked, f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "Perplexity (one_shot)" in printed
    assert "passkey, none: percent of 1 prompts answered" in printed
    keys = {"perplexity/none/one_shot/128", "perplexity/ntk/one_shot/128", "passkey/none/300", "passkey/ntk/300"}
    assert set(json.loads(output.read_text())["metrics"]) == keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[passkey]", "task_lengths=[40]"], "task_lengths=40: passkey needs at least "),
        (["tasks=[passkeys]"], "tasks[0]: "),
        (["tasks=[ruler,qa_1]"], "tasks=qa_1: it needs SQuAD or HotpotQA"),
        (["tasks=[ruler]", "task_lengths=[256]"], "task_lengths=256: niah_multikey_1 needs at least "),
        (["tasks=[passkey]", "depths=[0,1.5]"], "depths=[0.0, 1.5]: a finite number, at most 1"),
        (["tasks=[passkey]", "depths=[-0.5]"], "depths=[-0.5]: one or more places from 0"),
        (["tasks=[passkey]", "depths=[]"], "depths=[]: "),
        (["tasks=[passkey]", "num_prompts=0"], "num_prompts=0: at least 1"),
        (["tasks=[passkey]", "task_lengths=[]"], "task_lengths=[]: "),
        (["protocols=[]"], "protocols=[]: one or more protocols"),
        (["tasks=[passkey]", "protocols=[streaming]", "methods=[none]"], "ask for tasks apart"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(places, monkeypatch, capsys, arguments, message) -> None:
    status = call(monkeypatch, places, "lengths=[128]", *arguments)
    error = capsys.readouterr().err
    assert status == console.USER_ERROR
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("on_host", [False, True])
def test_a_training_run_evaluates_the_tasks_that_it_is_asked_for(
    places, tmp_path, byte_tokenizer, monkeypatch, on_host: bool
) -> None:
    on_the_host, real = [], growing.HostLayer
    monkeypatch.setattr(growing, "HostLayer", lambda capacity: on_the_host.append(capacity) or real(capacity))
    tasks = [Task.passkey, Task.needle]
    settings = {"task_lengths": [256], "depths": [0.0, 1.0], "num_prompts": 2, "chunk_len": 32}
    spec = EvaluationConfig(lengths=[128], tasks=tasks, offload_cache=on_host, **settings)
    config = Config(model=ModelConfig(path=places["model"]), evaluation=spec, output_dir=str(tmp_path))
    model = copying_llama.build(len(byte_tokenizer))
    loaded = LoadedModel(model, install_rotary(model, copying_llama.CONTEXT_LEN), copying_llama.CONTEXT_LEN)
    evaluation = TrainingEvaluation(
        config, TokenStore(places["store"]), copying_llama.CONTEXT_LEN, tokenizer=byte_tokenizer
    )
    metrics = evaluation(loaded, step=7)
    assert set(metrics) == {"perplexity/trained/one_shot/128", "passkey/trained/256", "needle/trained/256"}
    assert metrics["passkey/trained/256"] == metrics["needle/trained/256"] == 1
    read, _ = results.read(Path(tmp_path) / "evaluation" / "step_7.json")
    assert [(row.depth, row.correct) for row in read.tasks] == [(0.0, 2), (1.0, 2)] * 2
    # Those of the window and those of prompts with their answers.
    assert {capacity >= 256 for capacity in on_the_host} == ({False, True} if on_host else set())
