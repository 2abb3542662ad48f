"""Averages of benchmarks and their standard errors, against sums by hand; RULER's metrics."""

import math

import pytest

from clex_train.harness import ruler_scores, table
from clex_train.harness.benchmark import BenchmarkTask, Group, Mean
from clex_train.harness.scores import Value

ROWS = {"a": ("x", 100, 0.2, 0.03), "b": ("x", 300, 0.4, 0.04), "c": ("y", 200, 0.9, 0.0)}
TASKS = [BenchmarkTask(name, "G", category, size, "", "") for name, (category, size, _, _) in ROWS.items()]
SCORES = {name: {"": Value(value, error)} for name, (_, _, value, error) in ROWS.items()}


@pytest.mark.parametrize(
    ("mean", "expected", "error"),
    [
        (Mean.categories, (0.3 + 0.9) / 2, math.hypot(0.03 / 2, 0.04 / 2) / 2),
        (Mean.tasks, 1.5 / 3, math.hypot(0.03, 0.04) / 3),
        (Mean.rows, (20 + 120 + 180) / 600, math.hypot(3, 12) / 600),
    ],
)
def test_averages_and_their_errors(mean, expected, error) -> None:
    made = table.averages(Group("G", 3, mean), TASKS, SCORES)
    assert [line.name for line in made] == ["G: x", "G: y", "G average"]
    assert made[-1].values[""].value == pytest.approx(expected)
    assert made[-1].values[""].error == pytest.approx(error)


def test_a_part_of_a_benchmark_says_so_and_a_limit_changes_weights() -> None:
    (line,) = table.averages(Group("G", 3, Mean.rows), TASKS[1:2], SCORES)
    assert line.name == "G average (part: 1 of 3 tasks)"
    limited = table.averages(Group("G", 3, Mean.rows), TASKS, SCORES, limit=50)[-1].values[""]
    assert limited.value == pytest.approx(1.5 / 3)


def test_the_average_of_llama_2_is_the_published_one() -> None:
    """Recompute Llama-2-7B-chat's 26.76 from its columns in the README of CLEX."""
    published = {"single": 21.65, "multi": 18.2, "summary": 18.53, "few": 49.95, "synthetic": 4.13, "code": 48.1}
    tasks = [BenchmarkTask(name, "LongBench", name, 200, "", "") for name in published]
    scores = {name: {"": Value(value, None)} for name, value in published.items()}
    (line,) = table.averages(Group("LongBench", 6, Mean.categories), tasks, scores)
    assert line.values[""].value == pytest.approx(26.76, abs=0.005)
    assert line.values[""].error is None


def test_markdown_has_percent_and_a_line_a_score() -> None:
    made = [
        table.Line("a", {"none": Value(0.25, 0.01), "ntk": Value(0.5, None)}),
        table.Line("b", {"ntk": Value(1, 0)}),
    ]
    text = table.markdown(made, is_share=True)
    assert text.splitlines()[2].split() == ["|", "a", "|", "25.00", "±", "1.00", "|", "50.00", "|"]
    assert text.splitlines()[3].split() == ["|", "b", "|", "|", "100.00", "±", "0.00", "|"]


def test_rulers_metrics_take_every_string_or_one() -> None:
    doc = {"outputs": ["Blue", "red"]}
    assert ruler_scores.every(doc, ["it is BLUE\x03"]) == {"score": 0.5}
    assert ruler_scores.any_of(doc, ["it is BLUE"]) == {"score": 1.0}
    assert ruler_scores.any_of(doc, ["green"]) == {"score": 0.0}
