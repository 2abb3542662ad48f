"""Table of an evaluation by lm-eval: a line a score, a column a method, standard errors, averages of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clex_train.harness.benchmark import Benchmark, BenchmarkTask, Group, Mean
from clex_train.harness.scores import Found, Value

PRIMARY = ("score", "acc")
"""Metrics of the benchmarks, one a task."""


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str
    values: dict[str, Value]
    """By method; "" for the unchanged model."""
    is_average: bool = False


def lines(found: Sequence[Found], benchmark: Benchmark | None, limit: int | None = None) -> list[Line]:
    """Return the scores of all tasks, and behind those of a benchmark its averages."""
    if benchmark is None:
        rows = {each.method: each.values() for each in found}
        names = dict.fromkeys((task, metric) for row in rows.values() for task in row for metric in row[task])
        return [Line(f"{task}/{metric}", _by_method(rows, task, metric)) for task, metric in names]
    # In the benchmark's order, and only those that were asked for.
    tasks = [task for task in benchmark.tasks if task.name in found[0].values()]
    scores = {task.name: _primary(found, task) for task in tasks}
    made = [Line(task.name, scores[task.name]) for task in tasks]
    for group in benchmark.groups:
        made += averages(group, [task for task in tasks if task.group == group.name], scores, limit)
    return made


def averages(
    group: Group,
    tasks: Sequence[BenchmarkTask],
    scores: Mapping[str, Mapping[str, Value]],
    limit: int | None = None,
) -> list[Line]:
    """Return the means of the categories and the benchmark's average; a part of a benchmark says so in its name."""
    if not tasks:
        return []
    categories = {task.category: [other for other in tasks if other.category == task.category] for task in tasks}
    made, methods = [], scores[tasks[0].name]
    sizes = {task.name: min(task.num_rows, limit or task.num_rows) for task in tasks}

    def mean(members: Sequence[BenchmarkTask], method: str) -> Value:
        weights = [float(sizes[task.name]) if group.mean is Mean.rows else 1.0 for task in members]
        return _mean([scores[task.name][method] for task in members], weights)

    by_category: dict[str, dict[str, Value]] = {}
    for name, members in categories.items():
        by_category[name] = {method: mean(members, method) for method in methods}
        # Lines that would repeat those of single tasks are left out.
        if len(categories) > 1 and any(len(others) > 1 for others in categories.values()):
            made.append(Line(f"{group.name}: {name}", by_category[name], is_average=True))
    if group.mean is Mean.categories:
        whole = {m: _mean([values[m] for values in by_category.values()], [1.0] * len(by_category)) for m in methods}
    else:
        whole = {method: mean(tasks, method) for method in methods}
    part = "" if len(tasks) == group.num_tasks else f" (part: {len(tasks)} of {group.num_tasks} tasks)"
    return [*made, Line(f"{group.name} average{part}", whole, is_average=True)]


def page(table: Sequence[Line], found: Sequence[Found], benchmark: Benchmark | None, limit: int | None = None) -> str:
    """Format the table with remarks on what it leaves out: rows beyond a limit, prompts that were cut."""
    remarks = [f"Only the first {limit} rows of each task."] if limit else []
    remarks += benchmark.notes if benchmark is not None else []
    for each in found:
        cut = sum(prompts["num_shortened"] for prompts in each.prompts.values())
        total = sum(prompts["num"] for prompts in each.prompts.values())
        if cut:
            remarks.append(f"{each.method or 'model'}: {cut:,} of {total:,} prompts are cut.")
    share = "Scores in percent, ± one standard error." if benchmark is not None else ""
    return "\n\n".join(filter(None, [markdown(table, benchmark is not None), share, *remarks]))


def markdown(table: Sequence[Line], is_share: bool) -> str:
    """Format a table in markdown; scores that are shares are shown in percent."""
    methods = [*table[0].values] if table else []
    scale, digits = (100.0, 2) if is_share else (1.0, 4)
    head = ["score", *(method or "model" for method in methods)]
    body = []
    for line in table:
        cells = [line.values[m].text(scale, digits) if m in line.values else "" for m in methods]
        mark = "**" if line.is_average else ""
        body.append([f"{mark}{line.name}{mark}", *cells])
    rows = [head, ["---", *["---:"] * len(methods)], *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)) + " |" for row in rows)


def _by_method(rows: Mapping[str, Mapping[str, Mapping[str, Value]]], task: str, metric: str) -> dict[str, Value]:
    return {method: by_task[task][metric] for method, by_task in rows.items() if metric in by_task.get(task, {})}


def _primary(found: Sequence[Found], task: BenchmarkTask) -> dict[str, Value]:
    rows = {each.method: each.values().get(task.name, {}) for each in found}
    return {method: next(row[key] for key in PRIMARY if key in row) for method, row in rows.items()}


def _mean(values: Sequence[Value], weights: Sequence[float]) -> Value:
    """Return the weighted mean; the errors of different tasks are independent."""
    total = math.fsum(weights)
    mean = math.fsum(w * v.value for w, v in zip(weights, values, strict=True)) / total
    errors = [v.error for v in values]
    # One unknown error makes that of the mean unknown: leaving it out would make the mean look exact.
    if any(error is None for error in errors):
        return Value(mean, None)
    # Variances of independent means add.
    squares = math.fsum((w * (error or 0.0)) ** 2 for w, error in zip(weights, errors, strict=True))
    return Value(mean, math.sqrt(squares) / total)
