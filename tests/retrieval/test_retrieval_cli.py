"""Retrieval in the evaluate program and in a training run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from clex_train.cli import evaluate as program
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.model import ModelConfig
from clex_train.config.retrieval import Task
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.evaluation import partial_results, results, retrieval_runner
from clex_train.measures.during_training import TrainingEvaluation
from clex_train.models.load import LoadedModel
from clex_train.retrieval.haystack import Documents
from clex_train.retrieval.prompts import Ask
from clex_train.retrieval.tasks import TASKS
from clex_train.rope import preallocated_cache
from clex_train.rope.patch import install_rotary
from clex_train.token_store.store import TokenStore
from clex_train.utils.seeding import generator
from tests.retrieval import copying_llama
from tests.retrieval.text_stores import write_text_store

TEXT = "It rained all night. In the morning the river had risen, and nobody crossed the bridge. " * 60


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> dict[str, str]:
    """Save a model with its tokenizer, and a store of text."""
    root = tmp_path_factory.mktemp("retrieval")
    LlamaForCausalLM(copying_llama.build(len(byte_tokenizer)).config).save_pretrained(root / "base")
    byte_tokenizer.save_pretrained(root / "base")
    write_text_store(root / "store", [TEXT, TEXT[500:]], byte_tokenizer)
    return {"model": str(root / "base"), "store": str(root / "store")}


def call(monkeypatch: pytest.MonkeyPatch, places: dict[str, str], *arguments: str) -> int:
    given = [f"model={places['model']}", f"data={places['store']}", "precision=fp32", "methods=[none,ntk]"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, *arguments])
    return console.run(program.main, program.usage)


def test_the_program_can_run_only_prompts_and_writes_their_rows(places, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "tasks.json"
    asked = ["tasks=[passkey]", "protocols=[]", "lengths=[256,512]", "depths=[0,1]", "num_prompts=2"]
    assert call(monkeypatch, places, *asked, f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "passkey, ntk: percent of 2 prompts answered" in printed
    content = json.loads(output.read_text())
    assert [tuple(row) for row in content["tasks"]] == [
        ("task", "method", "length", "depth", "correct", "total", "score", "seed", "prompts", "copied_from")
    ] * 8
    assert [(row["method"], row["length"], row["depth"]) for row in content["tasks"][:3]] == [
        ("none", 256, 0.0),
        ("none", 256, 1.0),
        ("none", 512, 0.0),
    ]
    assert set(content["metrics"]) == {f"passkey/{m}/{n}" for m in ("none", "ntk") for n in (256, 512)}
    read, _ = results.read(output)
    assert [vars(row) for row in read.tasks] == content["tasks"]


def test_tasks_run_with_perplexity_and_have_separate_lengths(places, tmp_path, monkeypatch, capsys) -> None:
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
        (["tasks=[passkey]", "protocols=[streaming]", "methods=[none]"], "evaluate tasks separately"),
    ],
)
def test_bad_input_is_refused_in_one_line_with_its_key(places, monkeypatch, capsys, arguments, message) -> None:
    status = call(monkeypatch, places, "lengths=[128]", *arguments)
    error = capsys.readouterr().err
    assert status == console.USER_ERROR
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("on_host", [False, True])
def test_a_training_run_evaluates_the_configured_tasks(
    places, tmp_path, byte_tokenizer, monkeypatch, on_host: bool
) -> None:
    on_the_host, real = [], preallocated_cache.HostLayer
    monkeypatch.setattr(
        preallocated_cache, "HostLayer", lambda capacity: on_the_host.append(capacity) or real(capacity)
    )
    tasks = [Task.passkey, Task.needle]
    settings = {"task_lengths": [256], "depths": [0.0, 1.0], "num_prompts": 2, "chunk_len": 32}
    spec = EvaluationConfig(lengths=[128], tasks=tasks, offload_cache=on_host, **settings)
    config = Config(model=ModelConfig(path=places["model"]), evaluation=spec, output_dir=str(tmp_path))
    model = copying_llama.build(len(byte_tokenizer))
    loaded = LoadedModel(model, install_rotary(model, copying_llama.CONTEXT_LEN), copying_llama.CONTEXT_LEN)
    store = TokenStore(places["store"])
    evaluation = TrainingEvaluation(
        config, store, store.split("validation"), copying_llama.CONTEXT_LEN, tokenizer=byte_tokenizer
    )
    metrics = evaluation(loaded, step=7)
    assert set(metrics) == {"perplexity/trained/one_shot/128", "passkey/trained/256", "needle/trained/256"}
    assert metrics["passkey/trained/256"] == metrics["needle/trained/256"] == 1
    read, _ = results.read(Path(tmp_path) / "evaluation" / "step_7.json")
    assert [(row.depth, row.correct) for row in read.tasks] == [(0.0, 2), (1.0, 2)] * 2
    # Tokens of the window, and of prompts with their answers.
    assert {capacity >= 256 for capacity in on_the_host} == ({False, True} if on_host else set())


class Interrupted(BaseException):
    """Interrupt the program in the middle."""


def test_the_same_command_resumes_where_it_was_interrupted(places, tmp_path, monkeypatch, caplog) -> None:
    asked = ["tasks=[passkey]", "protocols=[]", "lengths=[256,512]", "depths=[0,1]", "num_prompts=2", "chunk_len=100"]
    monkeypatch.setattr(partial_results, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(partial_results, "WRITES", 0)
    assert call(monkeypatch, places, *asked, f"output={tmp_path / 'whole.json'}") == 0
    asked_for, greedy, most = [], retrieval_runner.greedy, [6]

    def counted(*args: Any) -> Any:
        if len(asked_for) == most[0]:
            raise Interrupted
        asked_for.append(1)
        return greedy(*args)

    monkeypatch.setattr(retrieval_runner, "greedy", counted)
    output = tmp_path / "x.json"
    with pytest.raises(Interrupted):
        call(monkeypatch, places, *asked, f"output={output}")
    most[0] = 100
    with caplog.at_level("INFO", logger="clex_train"):
        assert call(monkeypatch, places, *asked, f"output={output}") == 0
    assert "1 of 4 cells found from an interrupted evaluation" in caplog.text
    assert len(asked_for) == 4 * 4, "two lengths, two methods, no prompt twice"
    found = [json.loads(file.read_text()) for file in (output, tmp_path / "whole.json")]
    assert found[0]["tasks"] == found[1]["tasks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.json", "x.json"]


def test_instruct_models_get_prompts_in_their_chat_template(
    places, tmp_path, monkeypatch, capsys, byte_tokenizer
) -> None:
    asked = ["tasks=[passkey]", "protocols=[]", "lengths=[256]", "depths=[0.5]", "num_prompts=1"]
    assert call(monkeypatch, places, *asked, "chat_template=true") == console.USER_ERROR
    assert "error: chat_template=True: the tokenizer has no chat template; leave" in capsys.readouterr().err
    instruct = shutil.copytree(places["model"], tmp_path / "instruct")
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    (instruct / "chat_template.jinja").write_text(template)
    read, greedy = [], retrieval_runner.greedy
    monkeypatch.setattr(
        retrieval_runner, "greedy", lambda model, ids, *more: (read.append(ids), greedy(model, ids, *more))[1]
    )
    output = tmp_path / "x.json"
    own = {**places, "model": str(instruct)}
    assert call(monkeypatch, own, *asked, "chat_template=true", "methods=[none]", f"output={output}") == 0
    text = byte_tokenizer.decode(read[0])
    assert text.startswith("[user]One important fact is hidden")
    assert text.endswith("What is the pass key?[assistant]The pass key is")
    assert json.loads(output.read_text())["request"]["chat_template"] is True
    assert len(read[0]) <= 256


@pytest.mark.parametrize("task", list(TASKS))
def test_every_prompt_ends_with_the_beginning_of_its_answer(places, byte_tokenizer, task: Task) -> None:
    documents = Documents(TokenStore(places["store"]).split("validation"), byte_tokenizer)
    draft = TASKS[task].draft(Ask(generator(0, "test"), 1200, 0.5, documents))
    assert draft.lead
    assert all(draft.text(units).endswith((f" {draft.lead}", f"\n{draft.lead}")) for units in (0, 9))
