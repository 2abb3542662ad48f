"""Conversion of published benchmarks: rows and task files that lm-eval reads, and refusals by name."""

import json
import zipfile
from importlib import util
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from clex_train.harness import benchmark
from clex_train.harness.benchmark import Kind
from clex_train.utils.errors import ConfigError
from data_prep.benchmark import babilong, longbench, longbench_v2
from data_prep.benchmark.config import BenchmarkVerb
from data_prep.benchmark.run import run
from tests.harness.benchmark_rows import longbench_row, write_lines, write_longbench

HAS_HARNESS = util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="needs requirements-eval.txt")


@pytest.fixture(autouse=True)
def _stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for lm-eval's task files where it is not installed: their paths are all that conversion needs."""
    if HAS_HARNESS:
        return
    names = [f"longbench/{name}.yaml" for name in longbench.TASKS]
    names += [f"longbench2/{name}.yaml" for _, name in longbench_v2.SUBDOMAINS.values()]
    names += [f"babilong/babilong_{name}.yaml" for name in babilong.TASKS]
    for name in names:
        (tmp_path / "stock" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stock" / name).touch()
    monkeypatch.setattr(benchmark, "stock_tasks", lambda: tmp_path / "stock")


def convert(kind: Kind, path: Path, output: Path, **given: Any) -> benchmark.Benchmark:
    run(BenchmarkVerb(kind=kind, paths=[str(path)], output=str(output), **{"allow_partial": True} | given))
    return benchmark.read(output)


def rows(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def first_prompt(folder: Path, task: str) -> tuple[str, Any]:
    """Return prompt and target of the first row as lm-eval makes them."""
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=folder, include_defaults=False).load([task])["tasks"][task]
    doc = next(iter(found.test_docs()))
    found.set_fewshot_seed(0)
    prefix = found.doc_to_prefix(doc)
    return found.fewshot_context(doc, found.config.num_fewshot or 0, gen_prefix=prefix), found.doc_to_target(doc)


def v2_row(number: int, domain: str = "Single-Document QA", sub_domain: str = "Academic") -> dict[str, Any]:
    choices = {f"choice_{letter}": f"{letter.lower()} of {number}" for letter in "ABCD"}
    texts = {"domain": domain, "sub_domain": sub_domain, "difficulty": "easy", "length": "short"}
    return {"_id": str(number), **texts, "question": "which? ", **choices, "answer": "B", "context": "long text"}


def ruler_row(number: int, **more: Any) -> dict[str, Any]:
    return {"index": number, "input": f"haystack {number}. Question?", "outputs": ["17"], "length": 90, **more}


def test_longbench_is_the_same_from_files_and_from_the_archive(tmp_path) -> None:
    write_longbench(tmp_path / "published", ("qasper", "trec", "qasper_e"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in (tmp_path / "published" / "data").iterdir():
            archive.write(path, f"data/{path.name}")
    from_files = convert(Kind.longbench, tmp_path / "published", tmp_path / "a")
    from_archive = convert(Kind.longbench, tmp_path / "data.zip", tmp_path / "b")
    assert from_files.tasks == from_archive.tasks
    assert [task.name for task in from_files.tasks] == ["longbench_qasper", "longbench_trec", "longbench_qasper_e"]
    assert [task.in_chat for task in from_files.tasks] == [True, False, True]
    assert [task.group for task in from_files.tasks] == ["LongBench", "LongBench", "LongBench-E"]
    (first, *_), published = rows(tmp_path / "a", "longbench_qasper"), longbench_row("qasper", 0)
    assert first == {"question": published.pop("input"), **published}


@needs_harness
def test_longbench_has_lm_evals_prompt_and_metric(tmp_path) -> None:
    write_longbench(tmp_path / "published", ("qasper",))
    convert(Kind.longbench, tmp_path / "published", tmp_path / "out")
    prompt, target = first_prompt(tmp_path / "out", "longbench_qasper")
    row = longbench_row("qasper", 0)
    assert prompt.startswith("You are given a scientific article and a question.")
    assert f"Article: {row['context']}\n\n Answer the question" in prompt
    assert prompt.endswith(f"Question: {row['input']}\n\nAnswer:")
    assert target == row["answers"]


def test_longbench_v2_is_split_by_sub_domain(tmp_path) -> None:
    made = [v2_row(0), v2_row(1, "Multi-Document QA", "Multi-news"), v2_row(2)]
    (tmp_path / "data.json").write_text(json.dumps(made, indent=1))
    found = convert(Kind.longbench_v2, tmp_path / "data.json", tmp_path / "out")
    assert {task.name: task.num_rows for task in found.tasks} == {
        "longbench2_academic_single": 2,
        "longbench2_news_multi": 1,
    }
    assert found.notes == ["data.json: 3 rows where 503 are published"]
    assert rows(tmp_path / "out", "longbench2_news_multi")[0]["choices"] == ["a of 1", "b of 1", "c of 1", "d of 1"]


@needs_harness
def test_longbench_v2_has_lm_evals_prompt(tmp_path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([v2_row(0)]))
    convert(Kind.longbench_v2, tmp_path / "data.json", tmp_path / "out")
    prompt, target = first_prompt(tmp_path / "out", "longbench2_academic_single")
    assert prompt.startswith(
        "Please read the following text and answer the question below.\n\n<text>\nlong text\n</text>"
    )
    assert prompt.endswith("which?\nChoices:\n(A) a of 0\n(B) b of 0\n(C) c of 0\n(D) d of 0\n\nAnswer:")
    assert target in ("B", 1)


@pytest.mark.parametrize("more", [{}, {"answer_prefix": " The number is", "length_w_model_temp": 95}])
def test_ruler_is_a_task_for_each_length(tmp_path, more) -> None:
    for length in (4096, 8192):
        for task in ("niah_single_1", "qa_1"):
            place = tmp_path / "llama" / "synthetic" / str(length) / "data" / task / "validation.jsonl"
            write_lines(place, [ruler_row(number, **more) for number in range(2)])
    found = convert(Kind.ruler, tmp_path / "llama", tmp_path / "out")
    assert [task.name for task in found.tasks] == [
        *("ruler_niah_single_1_4096", "ruler_qa_1_4096", "ruler_niah_single_1_8192", "ruler_qa_1_8192")
    ]
    assert [group.name for group in found.groups] == ["RULER 4096", "RULER 8192"]
    text = (tmp_path / "out" / "ruler_qa_1_8192.yaml").read_text()
    assert "process_results: !function clex_train.harness.ruler_scores.any_of" in text
    if HAS_HARNESS:
        prompt, _ = first_prompt(tmp_path / "out", "ruler_niah_single_1_4096")
        assert prompt == "haystack 0. Question?" + more.get("answer_prefix", "")


@pytest.mark.parametrize("layout", ["qa2/4k.json", "4k/qa2-00000-of-00001.parquet", "babilong_qa2_4k.jsonl"])
def test_babilong_is_read_in_each_layout(tmp_path, layout) -> None:
    row = {"input": "Mary went to the hall.", "question": "Where is Mary?", "target": "hall"}
    path = tmp_path / "published" / layout
    path.parent.mkdir(parents=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row]) if path.suffix == ".json" else json.dumps(row) + "\n")
    found = convert(Kind.babilong, tmp_path / "published", tmp_path / "out")
    assert [task.name for task in found.tasks] == ["babilong_qa2_4k"]
    assert rows(tmp_path / "out", "babilong_qa2_4k") == [row]
    if HAS_HARNESS:
        prompt, target = first_prompt(tmp_path / "out", "babilong_qa2_4k")
        assert prompt.startswith("I will give you context with the facts about locations and actions")
        assert prompt.endswith("Mary went to the hall.\nWhere is Mary?")
        assert target == "hall"


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("longbench", "qaspr.jsonl", [longbench_row("qasper", 0)], "no data set of LongBench; it has narrativeqa"),
        ("longbench", "qasper.jsonl", [without(longbench_row("qasper", 0), "answers")], "row 1 has no answers"),
        ("longbench", "qasper.jsonl", [longbench_row("qasper", 0) | {"b": 1}], "row 1 has unknown columns b"),
        ("longbench", "trec.jsonl", [longbench_row("qasper", 0)], "all_classes of row 1 is not a list"),
        ("longbench", "qasper.jsonl", [longbench_row("hotpotqa", 0)], "has rows of hotpotqa; is the name right?"),
        ("longbench", "qasper.jsonl", '{"input": "a", "con', "not JSON in line 1"),
        ("longbench", "data.zip", "PK\x03\x04 cut", "not a zip archive"),
        ("longbench_v2", "data.json", json.dumps([v2_row(0)])[:90], "not JSON"),
        ("longbench_v2", "data.json", [v2_row(0, sub_domain="Poems")], "Poems of row 1 is no sub-domain"),
        ("longbench_v2", "data.json", [v2_row(0) | {"answer": "E"}], "answer of row 1 is E, not A, B, C or D"),
        ("ruler", "4096/niah_x/validation.jsonl", [ruler_row(0)], "is in no folder named as a task"),
        ("ruler", "data/vt/validation.jsonl", [ruler_row(0)], "is below no folder named as a length"),
        ("ruler", "4096/vt/validation.jsonl", [ruler_row(0) | {"outputs": []}], "outputs of row 1 is not a list"),
        ("babilong", "qa21/4k.json", [{"input": "", "question": "", "target": ""}], "gives no task and length"),
        ("babilong", "qa1/4k.json", [{"input": "a", "question": "b"}], "row 1 has no target"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, kind, name, content, message) -> None:
    path = tmp_path / "published" / name
    if isinstance(content, list):
        write_lines(path, content)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        convert(Kind(kind), tmp_path / "published", tmp_path / "out")
    assert message in str(refused.value)
    assert path.name in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"allow_partial": False}, "has 3 rows where 200 are published: cut short?"),
        ({"tasks": ["qaspr"]}, "tasks=[qaspr]: no task of this benchmark; it has narrativeqa"),
        ({"tasks": ["trec"]}, "tasks=[trec]: no file of these is in "),
        ({"paths": ["nowhere"]}, "paths=nowhere: no such file or folder"),
        ({"kind": None}, "kind: name the benchmark: longbench, longbench_v2, ruler, babilong"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(tmp_path, given, message) -> None:
    write_longbench(tmp_path / "published", ("qasper",))
    asked = {"kind": Kind.longbench, "paths": [str(tmp_path / "published")], "allow_partial": True}
    with pytest.raises(ConfigError) as refused:
        run(BenchmarkVerb(**asked | {"output": str(tmp_path / "out")} | given))
    assert message in str(refused.value)


def test_an_output_is_replaced_only_on_request_and_only_if_it_is_a_benchmark(tmp_path) -> None:
    write_longbench(tmp_path / "published", ("qasper",))
    convert(Kind.longbench, tmp_path / "published", tmp_path / "out")
    with pytest.raises(ConfigError, match="overwrite=true"):
        convert(Kind.longbench, tmp_path / "published", tmp_path / "out")
    convert(Kind.longbench, tmp_path / "published", tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="is no benchmark of this program"):
        convert(Kind.longbench, tmp_path / "published", tmp_path / "published", overwrite=True)
