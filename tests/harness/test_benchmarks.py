"""Benchmark folders: scores equal to lm-eval's own model on exported directories, cells that resume, refusals."""

import json
import sys
from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from clex_train.cli import export
from clex_train.cli import lm_eval as program
from clex_train.console import program as console
from clex_train.harness.benchmark import Kind
from data_prep.benchmark import run as converter
from data_prep.benchmark.config import BenchmarkVerb
from tests.harness.benchmark_rows import CONTEXT_LEN, save_base, save_clex, write_lines, write_longbench
from tests.harness.lm_eval_tasks import needs_harness

NAMES = ("hotpotqa", "triviaqa")
TASKS = [f"longbench_{name}" for name in NAMES]
pytestmark = needs_harness


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with CLEX and one without, and convert two tasks of LongBench."""
    folder = tmp_path_factory.mktemp("benchmarks")
    save_clex(folder / "model")
    save_base(folder / "base")
    write_longbench(folder / "published", NAMES)
    asked = {"kind": Kind.longbench, "paths": [str(folder / "published")], "allow_partial": True}
    converter.run(BenchmarkVerb(**asked, output=str(folder / "longbench")))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, program: ModuleType = program) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    return console.run(program.main, program.usage)


def stock_scores(model: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the scores by lm-eval's own `hf` model on a directory."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32", "max_length": 4 * CONTEXT_LEN, "device": "cpu"},
        tasks=TASKS,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=1,
        log_samples=False,
    )
    return {task: {key: value for key, value in found["results"][task].items() if "," in key} for task in TASKS}


def export_clex(monkeypatch: pytest.MonkeyPatch, place: Path, output: Path) -> Path:
    asked = (f"model={place / 'model'}", "format=huggingface", "t=2", f"output={output}")
    assert call(monkeypatch, *asked, program=export) == 0
    return output


def export_ntk(place: Path, output: Path) -> Path:
    """Write the base with the larger base of NTK at t = 2: theta (2t - 1)^(d / (d - 2)) with d = 8."""
    copytree(place / "base", output)
    config = json.loads((output / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0 * 3.0 ** (8 / 6)}
    (output / "config.json").write_text(json.dumps(config))
    return output


def test_scores_of_three_methods_equal_those_of_lm_eval_on_the_exports(place, tmp_path, monkeypatch) -> None:
    # Prompts and answers have between L and 2 L tokens, so t is 2 throughout.
    output = tmp_path / "x.json"
    asked = [f"model={place / 'model'}", f"benchmark={place / 'longbench'}", "methods=[none,ntk,clex]"]
    assert call(monkeypatch, *asked, "precision=fp32", f"output={output}") == 0
    content = json.loads(output.read_text())
    directories = {
        "none": place / "base",
        "ntk": export_ntk(place, tmp_path / "ntk"),
        "clex": export_clex(monkeypatch, place, tmp_path / "clex"),
    }
    found = {method: content["lm_eval"][method]["results"] for method in directories}
    for method, directory in directories.items():
        ours = {task: {k: v for k, v in found[method][task].items() if "," in k} for task in TASKS}
        assert ours == stock_scores(directory, place / "longbench"), method
    scores = [[found[method][task]["score,none"] for task in TASKS] for method in directories]
    assert len({tuple(row) for row in scores}) == 3, "a test of equal methods shows nothing"
    assert all(0 < score < 1 for row in scores for score in row)
    assert content["prompts"]["none"]["longbench_hotpotqa"] == {"num": 3, "num_shortened": 0}


def test_the_table_has_standard_errors_and_the_average_of_the_categories(place, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "x.json"
    asked = [f"model={place / 'model'}", f"benchmark={place / 'longbench'}", "precision=fp32"]
    assert call(monkeypatch, *asked, f"output={output}") == 0
    content, said = json.loads(output.read_text()), capsys.readouterr().out
    rows = {line["name"]: line["values"] for line in content["table"]}
    first, second = (rows[task] for task in TASKS)
    mean = rows["LongBench average (part: 2 of 21 tasks)"]
    assert mean["value"] == pytest.approx((first["value"] + second["value"]) / 2)
    error = (first["standard_error"] ** 2 + second["standard_error"] ** 2) ** 0.5 / 2
    assert mean["standard_error"] == pytest.approx(error)
    line = f"| {100 * first['value']:.2f} ± {100 * first['standard_error']:.2f}"
    page = (tmp_path / "x.md").read_text()
    assert line in page
    assert line in said
    assert "hotpotqa.jsonl: 3 rows where 200 are published" in page


def test_the_other_benchmarks_run_through_one_command_each(place, tmp_path, monkeypatch) -> None:
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    texts = {"difficulty": "easy", "length": "short", "question": "which", "context": "2 3 4", "answer": "B"}
    v2 = {"_id": "1", "domain": "Code Repository Understanding", "sub_domain": "Code repo QA", **choices, **texts}
    ruler = {"index": 0, "input": "2 3 4", "outputs": [str(n) for n in range(2, 60)], "length": 3}
    babilong = {"input": "2 3", "question": "4", "target": "5"}
    published = {
        Kind.longbench_v2: ("data.json", v2, "longbench2_code", "LongBench v2 average (part: 1 of 20 tasks)"),
        Kind.ruler: ("4096/fwe/validation.jsonl", ruler, "ruler_fwe_4096", "RULER 4096 average (part: 1 of 13 tasks)"),
        Kind.babilong: ("qa1/0k.json", babilong, "babilong_qa1_0k", "BABILong 0k average (part: 1 of 20 tasks)"),
    }
    for kind, (name, row, task, average) in published.items():
        write_lines(tmp_path / kind.value / name, [row])
        asked = {"kind": kind, "paths": [str(tmp_path / kind.value)], "allow_partial": True}
        folder, output = tmp_path / f"{kind.value}_folder", tmp_path / f"{kind.value}.json"
        converter.run(BenchmarkVerb(**asked, output=str(folder)))
        given = (f"model={place / 'model'}", f"benchmark={folder}", "methods=[none]", f"output={output}")
        assert call(monkeypatch, *given) == 0
        rows = {line["name"]: line["values"]["none"]["value"] for line in json.loads(output.read_text())["table"]}
        assert rows.keys() == {task, average}
        assert 0 <= rows[task] == rows[average] <= 1
    assert 0 < json.loads((tmp_path / "ruler.json").read_text())["metrics"]["lm_eval/ruler_fwe_4096/none/score"] < 1


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every forward."""
    made: list[int] = []
    forward = LlamaForCausalLM.forward

    def counted(self, *args, **inputs):
        made.append(1)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return made


def test_finished_cells_are_not_computed_again(place, tmp_path, monkeypatch, forwards, caplog) -> None:
    model = copytree(place / "model", tmp_path / "model")
    asked = [f"model={model}", f"benchmark={place / 'longbench'}", "precision=fp32", f"output={tmp_path / 'x.json'}"]
    one = [*asked, "tasks=[longbench_hotpotqa]", "limit=1"]
    assert call(monkeypatch, *one, "methods=[none]") == 0
    single = len(forwards)
    assert single > 1
    forwards.clear()
    with monkeypatch.context() as unread:
        # All cells are there, so weights are not read.
        unread.setattr(program, "load", None)
        assert call(monkeypatch, *one, "methods=[none]") == 0
    with caplog.at_level("INFO", logger="clex_train"):
        assert call(monkeypatch, *one, "methods=[none,ntk]") == 0
    assert "1 of 2 cells are finished (" in caplog.text
    by_ntk = len(forwards)
    assert by_ntk > 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert {"none", "ntk"} == content["lm_eval"].keys()
    # Other weights, and a damaged cell, are computed again.
    cell = next((tmp_path / "x.cells").glob("longbench_hotpotqa.ntk.*.json"))
    cell.write_text(cell.read_text()[:100])
    forwards.clear()
    assert call(monkeypatch, *one, "methods=[none,ntk]") == 0
    assert len(forwards) == by_ntk
    forwards.clear()
    (model / "note.bin").write_text("other weights")
    assert call(monkeypatch, *one, "methods=[none]") == 0
    assert len(forwards) == single


def test_long_prompts_lose_their_middle_before_the_chat_template(place, tmp_path, monkeypatch, capsys) -> None:
    model = copytree(place / "model", tmp_path / "model")
    template = "{% for m in messages %}2 3 {{ m['content'] }} 4{% endfor %}{% if add_generation_prompt %} 5{% endif %}"
    asked = [f"model={model}", f"benchmark={place / 'longbench'}", "precision=fp32", "limit=1", "max_prompt=61"]
    asked += [f"output={tmp_path / 'x.json'}", "chat_template=true"]
    assert call(monkeypatch, *asked) == console.USER_ERROR
    assert "chat_template=True: the tokenizer has no chat template" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text(template)
    read, forward = [], LlamaForCausalLM.forward

    def recording_forward(self, input_ids=None, *args, **inputs):
        if input_ids.shape[1] > 1:
            read.append(input_ids[0].tolist())
        return forward(self, input_ids, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recording_forward)
    assert call(monkeypatch, *asked) == 0
    whole = whole_prompts(model, place / "longbench")
    # LongBench's few-shot tasks are read without a template.
    # The words at the seam are joined to one that the tokenizer does not know.
    halves = [[*ids[:29], 1, *ids[-29:]] for ids in whole]
    assert read == [[2, 3, *halves[0], 4, 5], halves[1]]
    assert json.loads((tmp_path / "x.json").read_text())["prompts"][TASKS[0]] == {"num": 1, "num_shortened": 1}
    assert "model: 2 of 2 prompts are cut." in (tmp_path / "x.md").read_text()


def whole_prompts(model: Path, folder: Path) -> list[list[int]]:
    """Return the ids of the first prompt of each task, by lm-eval's own template and transformers' tokenizer."""
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = TaskManager(include_path=folder, include_defaults=False).load(TASKS)["tasks"]
    texts = [tasks[name].doc_to_text(next(iter(tasks[name].test_docs()))) for name in TASKS]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark={folder}", "tasks=[longbench_qasper]"], "tasks=[longbench_qasper]: "),
        (["benchmark={folder}", "lengths=[64]"], "lengths=[64]: a benchmark has its own tasks and lengths"),
        (["benchmark=nowhere"], "benchmark=nowhere: no such folder; convert the published files again"),
        (["benchmark={model}"], "has no benchmark.json"),
        (["benchmark={folder}", "max_prompt=500"], "max_prompt=500: longbench_hotpotqa has 480 tokens"),
        (["benchmark={folder}", "max_length=33"], "max_length=33: longbench_hotpotqa answers with up to 32 tokens"),
        (["benchmark={folder}", "max_prompt=9", "truncation=left"], "max_prompt=9: truncates in the middle"),
        (["benchmark={moved}"], "was written for place "),
        (["benchmark={changed}"], "longbench_hotpotqa.jsonl has changed since it was converted"),
        (["benchmark={folder}", "apply_chat_template=true"], "chat_template"),
        (["benchmark={folder}", "method=ntk"], "methods"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(place, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.setattr(program, "load", None)
    places = {"folder": place / "longbench", "model": place / "model", "moved": tmp_path / "moved"}
    copytree(place / "longbench", tmp_path / "moved")
    places["changed"] = place / "changed"
    if "{changed}" in arguments[0]:
        asked = {"kind": Kind.longbench, "paths": [str(place / "published")], "allow_partial": True}
        converter.run(BenchmarkVerb(**asked, output=str(place / "changed")))
        rows = place / "changed" / "longbench_hotpotqa.jsonl"
        rows.write_text(rows.read_text() + rows.read_text())
    given = [argument.format(**places) for argument in arguments]
    assert call(monkeypatch, f"model={place / 'model'}", *given) == console.USER_ERROR
    assert message in capsys.readouterr().err
