"""Tasks of lm-eval on local data: log-likelihoods and generations at the t of each prompt."""

import json
import math
import sys
from functools import partial
from importlib import util
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from clex_train.cli import lm_eval as program
from clex_train.config.model import ModelConfig
from clex_train.console import program as console
from clex_train.evaluation import partial_results as partial_file
from clex_train.harness import requests, scores
from clex_train.models import load
from clex_train.models.directory import read_clex
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama
from tests.harness.lm_eval_tasks import GENERATION, LIKELIHOOD, needs_harness, save_number_model, write_documents

LENGTHS = (9, 30, 60)
LIMIT = [10**9]


@pytest.fixture(autouse=True)
def _hide_tasks_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide lm-eval's own 14,000 task files, whose index takes longer than all tests here."""
    if util.find_spec("lm_eval") is not None:
        from lm_eval import tasks

        monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a CLEX model that reads numbers."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_number_model(folder / "model")
    return folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def write_task(folder: Path, text: str, answers: list[list[int]]) -> None:
    """Write a task file and its documents: each prompt with its answer."""
    write_documents(folder, text, zip(prompts(), answers, strict=True))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    return console.run(program.main, program.usage)


def stock_log_likelihood(model_folder: Path, prompt: list[int], answer: list[int]) -> float:
    """Return the log-likelihood by transformers' Llama, with the frequencies of the least sufficient t."""
    model, (_, table, _) = build_tiny_llama(), read_clex(model_folder)
    tokens = torch.tensor([prompt + answer])
    t = math.ceil((tokens.shape[1] - 1) / CONTEXT_LEN)
    model.model.rotary_emb.inv_freq = table.at(float(t)).inv_freq.float()
    with torch.no_grad():
        scores = model(tokens[:, :-1]).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@needs_harness
def test_log_likelihoods_equal_those_of_the_stock_model_at_the_t_of_each_prompt(place, tmp_path, monkeypatch) -> None:
    answers = [[7, 5], [11], [80, 3, 9]]
    write_task(tmp_path / "tasks", LIKELIHOOD, answers)
    output = tmp_path / "deep" / "out.json"
    arguments = [f"model={place / 'model'}", "tasks=[next_number]", f"include={tmp_path / 'tasks'}", "precision=fp32"]
    assert call(monkeypatch, *arguments, f"output={output}") == 0
    content = json.loads(output.read_text())
    values = [stock_log_likelihood(place / "model", p, a) for p, a in zip(prompts(), answers, strict=True)]
    expected = math.exp(-sum(values) / len(values))
    assert content["metrics"]["lm_eval/next_number/perplexity"] == pytest.approx(expected, rel=1e-5)
    assert content["max_length"] == 4 * CONTEXT_LEN
    assert content["frequencies"] == "clex"
    assert len(content["model"]["hash"]) == 16
    assert content["lm_eval"]["n-samples"]["next_number"]["effective"] == 3


@needs_harness
def test_generation_crosses_a_step_of_t_like_the_model_alone(place, tmp_path, monkeypatch, capsys) -> None:
    loaded = load.load_for_evaluation(ModelConfig(path=str(place / "model")))
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        answers.append(made[0, len(prompt) :].tolist())
    write_task(tmp_path / "tasks", GENERATION, answers)
    arguments = [f"model={place / 'model'}", "tasks=[continued_*]", f"include={tmp_path / 'tasks'}", "precision=fp32"]
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments, "label=mine") == 0
    content = json.loads((tmp_path / "runs" / "mine" / "evaluation" / "lm_eval" / "mine.json").read_text())
    assert content["metrics"]["lm_eval/continued_numbers/exact_match"] == 1.0
    assert "| continued_numbers/exact_match | 1.0000 ± 0.0000 |" in capsys.readouterr().out


@needs_harness
def test_running_again_replaces_repeated_tasks_and_keeps_the_rest(place, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    copytree(place / "model", tmp_path / "other")
    (tmp_path / "other" / "note.bin").write_text("other weights than the model's")
    write_task(tmp_path / "tasks", LIKELIHOOD, [[7, 5], [11], [80, 3, 9]])

    def run(*arguments: str, model: Path = place / "model", tasks: str = "next_number") -> list[str]:
        keys = ["include=tasks", "precision=fp32", "label=mine", *arguments]
        with caplog.at_level("INFO", logger="clex_train"):
            assert call(monkeypatch, f"model={model}", f"tasks=[{tasks}]", *keys) == 0
        return sorted(path.name for path in (tmp_path / "runs" / "mine" / "evaluation" / "lm_eval").glob("*.json"))

    assert run() == ["mine.json"]
    assert run(tasks="next_*") == ["mine.json"], "the same task by a pattern"
    assert "writing this one to" not in caplog.text
    assert run("limit=2") == ["mine.json", "mine_2.json"]
    assert "mine.json is another evaluation and is kept; writing this one to " in caplog.text
    assert run(model=tmp_path / "other") == ["mine.json", "mine_2.json", "mine_3.json"]
    write_task(tmp_path / "tasks", LIKELIHOOD, [[7, 5], [12], [80, 3, 9]])
    assert run() == ["mine.json", "mine_2.json", "mine_3.json", "mine_4.json"]
    assert run("limit=2", "output=runs/mine/evaluation/lm_eval/mine.json") == run()[:4]
    assert json.loads((tmp_path / "runs/mine/evaluation/lm_eval/mine.json").read_text())["request"]["limit"] == 2


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[]"], "tasks=[]: one or more names"),
        (["tasks=[next_numbr]"], "tasks=[next_numbr]: lm-eval has no such task"),
        (["tasks=[next_number]", "max_length=65"], "max_length=65: beyond t_max * L = 4 * 16"),
        (["tasks=[next_number]", "include=nowhere"], "include=nowhere: no such folder"),
        (["tasks=[next_number]", "batch_size=0"], "batch_size=0: at least 1 prompt"),
        (["tasks=[next_number]", "include={folder}"], "tasks=[next_number]: their data cannot be read"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_weights_are_read(
    place, tmp_path, monkeypatch, capsys, arguments, message
) -> None:
    write_task(tmp_path / "tasks", LIKELIHOOD, [[1], [1], [1]])
    (tmp_path / "tasks" / "documents.json").unlink()
    monkeypatch.setattr(program, "load", None)
    words = [argument.format(folder=tmp_path / "tasks") for argument in arguments]
    assert call(monkeypatch, f"model={place / 'model'}", *words) == console.USER_ERROR
    assert message in capsys.readouterr().err


@needs_harness
def test_an_unreadable_model_is_refused_by_the_key_that_names_it(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert call(monkeypatch, f"model={tmp_path / 'empty'}", "tasks=[any]") == console.USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: model={tmp_path / 'empty'}: no readable config.json (")


class Interrupted(BaseException):
    """Interrupt the program in the middle."""


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every forward; interrupt the program at `LIMIT` forwards."""
    made: list[int] = []
    call = LlamaForCausalLM.forward

    def counted(self, *args, **inputs):
        if len(made) == LIMIT[0]:
            raise Interrupted
        made.append(1)
        return call(self, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    monkeypatch.setattr(partial_file, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(partial_file, "WRITES", 0)
    monkeypatch.setitem(globals(), "LIMIT", [10**9])
    return made


@needs_harness
@pytest.mark.parametrize(("kind", "text"), [("next_number", LIKELIHOOD), ("continued_numbers", GENERATION)])
def test_the_same_command_resumes_where_it_was_interrupted(
    place, tmp_path, monkeypatch, caplog, forwards, kind, text
) -> None:
    write_task(tmp_path / "tasks", text, [[7, 5], [11], [80, 3, 9]])
    asked = [f"model={place / 'model'}", f"tasks=[{kind}]", f"include={tmp_path / 'tasks'}", "precision=fp32"]
    asked += ["methods=[trained,ntk]"]
    assert call(monkeypatch, *asked, f"output={tmp_path / 'whole.json'}") == 0
    undisturbed = len(forwards)
    forwards.clear()
    output, LIMIT[0] = tmp_path / "x.json", undisturbed - 1
    with pytest.raises(Interrupted):
        call(monkeypatch, *asked, f"output={output}")
    LIMIT[0] = 10**9
    with caplog.at_level("INFO", logger="clex_train"):
        assert call(monkeypatch, *asked, f"output={output}") == 0
    assert "1 of 2 cells are finished (" in caplog.text
    assert f"ntk/{kind}/" in caplog.text
    assert ": 2 of 3 requests found from an interrupted evaluation (" in caplog.text
    assert len(forwards) <= undisturbed + 2
    whole, content = (json.loads(file.read_text()) for file in (tmp_path / "whole.json", output))
    assert content["metrics"] == whole["metrics"]
    assert [path.name for path in tmp_path.glob("*.partial")] == []


@needs_harness
def test_methods_equal_the_stock_model_with_their_frequencies(place, tmp_path, monkeypatch, capsys) -> None:
    answers = [[7, 5], [11], [80, 3, 9]]
    write_task(tmp_path / "tasks", LIKELIHOOD, answers)
    asked = [f"model={place / 'model'}", "tasks=[next_number]", f"include={tmp_path / 'tasks'}", "precision=fp32"]
    assert call(monkeypatch, *asked, "methods=[trained,none,lm_infinite]", f"output={tmp_path / 'x.json'}") == 0
    content = json.loads((tmp_path / "x.json").read_text())
    found = {m: content["metrics"][f"lm_eval/next_number/{m}/perplexity"] for m in ("trained", "none", "lm_infinite")}
    assert content["frequencies"] == {"trained": "clex", "none": "none", "lm_infinite": "none"}
    assert set(content["lm_eval"]) == {"trained", "none", "lm_infinite"}
    model, total = build_tiny_llama(), 0.0
    for prompt, answer in zip(prompts(), answers, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])[:, :-1]).logits[0].double().log_softmax(-1)
        total += sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    assert found["none"] == pytest.approx(math.exp(-total / len(answers)), rel=1e-5)
    assert len({round(value, 3) for value in found.values()}) == 3
    assert call(monkeypatch, *asked, "n_local=8") == console.USER_ERROR
    assert "methods: n_local goes with a method; name it" in capsys.readouterr().err


@needs_harness
def test_a_chat_template_is_applied_and_refused_if_missing(place, tmp_path, monkeypatch, capsys) -> None:
    answers = [[7, 5], [11], [80, 3, 9]]
    write_task(tmp_path / "tasks", LIKELIHOOD, answers)
    asked = [f"model={place / 'model'}", "tasks=[next_number]", f"include={tmp_path / 'tasks'}", "precision=fp32"]
    assert call(monkeypatch, *asked, "chat_template=true") == console.USER_ERROR
    assert "chat_template=True: the tokenizer has no chat template; leave the key out" in capsys.readouterr().err
    copytree(place / "model", tmp_path / "instruct")
    template = "{% for m in messages %}2 3 {{ m['content'] }} 4{% endfor %}{% if add_generation_prompt %} 5{% endif %}"
    (tmp_path / "instruct" / "chat_template.jinja").write_text(template)
    asked[0] = f"model={tmp_path / 'instruct'}"
    read, forward = [], LlamaForCausalLM.forward

    def recording_forward(self, input_ids=None, *args, **inputs):
        read.append(input_ids[0].tolist())
        return forward(self, input_ids, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recording_forward)
    assert call(monkeypatch, *asked, "chat_template=true", f"output={tmp_path / 'x.json'}") == 0
    # A prompt beyond max_length loses its beginning.
    asked_for = [[2, 3, *p, 4, 5, *a][-65:-1] for p, a in zip(prompts(), answers, strict=True)]
    assert sorted(read) == sorted(asked_for)
    assert json.loads((tmp_path / "x.json").read_text())["request"]["chat_template"] is True


@needs_harness
def test_a_dry_run_counts_the_forwards_and_writes_nothing(place, tmp_path, monkeypatch, capsys, forwards) -> None:
    write_task(tmp_path / "tasks", GENERATION, [[7, 5], [11], [80, 3, 9]])
    asked = [f"model={place / 'model'}", "tasks=[continued_numbers]", f"include={tmp_path / 'tasks'}"]
    asked += ["precision=fp32", f"output={tmp_path / 'x.json'}"]
    assert call(monkeypatch, *asked, "dry_run=true") == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["cells", "forwards", "tokens", "memory", "time"]
    assert not (tmp_path / "x.json").exists()
    forwards.clear()
    assert call(monkeypatch, *asked) == 0
    assert int(said["forwards"].split()[0]) == len(forwards) == 9
    assert int(said["tokens"]) == sum(LENGTHS) + 6


def test_requests_of_a_document_are_grouped_together() -> None:
    class Request(NamedTuple):
        task_name: str
        doc_id: int

    made = [Request("a", doc) for doc in (0, 0, 1, 1, 1, 2)] + [Request("b", 2)]
    assert [len(group) for group in requests.groups(made, 1)] == [2, 3, 1, 1]
    assert [len(group) for group in requests.groups(made, 3)] == [5, 2]


def test_a_missing_package_is_named_with_the_install_command(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr("clex_train.harness.tasks.find_spec", lambda name: None)
    assert call(monkeypatch, f"model={place / 'model'}", "tasks=[any]") == console.USER_ERROR
    assert "lm-eval is not installed: pip install -r requirements-eval.txt" in capsys.readouterr().err


def test_a_length_that_was_not_run_has_no_score() -> None:
    """Use the form of lm-eval's RULER tasks, which have a metric for each length."""
    results = {
        "results": {
            "niah_single_1": {"alias": "a", "4096,none": 0.5, "4096_stderr,none": "N/A", "8192,none": -1},
            "cola": {"mcc,none": -1, "8192_stderr,none": 0.0},
        },
        "groups": {"ruler": {"4096,none": 0.25, "8192,none": -1, "8192_stderr,none": "N/A"}},
    }
    assert scores.remove_not_run(results) == ["niah_single_1/8192", "ruler/8192"]
    assert scores.metrics(results) == {
        "lm_eval/niah_single_1/4096": 0.5,
        "lm_eval/cola/mcc": -1.0,
        "lm_eval/cola/8192_stderr": 0.0,
    }
    assert results["groups"] == {"ruler": {"4096,none": 0.25}}
