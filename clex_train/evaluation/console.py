"""Plain-text tables of an evaluation's results, for a terminal."""

from collections.abc import Sequence

from clex_train.evaluation.measure_scores import measure_tables
from clex_train.evaluation.results import Origin, Results
from clex_train.evaluation.tables import console as perplexity_table
from clex_train.evaluation.tables import from_results
from clex_train.evaluation.task_scores import TaskScore


def tables_of(results: Results, origin: Origin) -> str:
    """Format the tables of perplexity, retrieval and measures, as far as there are scores."""
    perplexity = [perplexity_table(from_results(results, origin))] if results.scores else []
    retrieval = [retrieval_table(results.tasks)] if results.tasks else []
    forced = [measure_tables(results.measures)] if results.measures else []
    return "\n\n".join([*perplexity, *retrieval, *forced])


def retrieval_table(scores: Sequence[TaskScore]) -> str:
    """Format one table per task and method with depths, in percent, then one table for tasks without depths."""
    # `dict.fromkeys` removes duplicates and keeps the order, unlike a set.
    graded = dict.fromkeys((s.task, s.method) for s in scores if s.depth is not None)
    blocks = [
        _grid(task, method, [s for s in scores if (s.task, s.method) == (task, method)]) for task, method in graded
    ]
    flat = [score for score in scores if score.depth is None]
    return "\n\n".join([*blocks, *([_list(flat)] if flat else [])])


def _grid(task: str, method: str, scores: Sequence[TaskScore]) -> str:
    cells = {(f"{s.depth:g}", s.length): s.score for s in scores}
    title = f"{task}, {method}: percent of {scores[0].total} prompts answered, by depth and length in tokens"
    return f"{title}\n" + _table("depth", cells)


def _list(scores: Sequence[TaskScore]) -> str:
    cells = {(f"{s.task}, {s.method}", s.length): s.score for s in scores}
    title = f"percent of the expected strings, mean over {scores[0].total} prompts, by length in tokens"
    return f"{title}\n" + _table("task", cells)


def _table(corner: str, cells: dict[tuple[str, int], float]) -> str:
    """Format a table with rows by name, in order of appearance, and columns by length."""
    names, lengths = list(dict.fromkeys(name for name, _ in cells)), sorted({length for _, length in cells})
    width = max(len(corner), *(len(name) for name in names))
    head = corner.ljust(width) + "".join(f"{length:>8}" for length in lengths)
    rows = [name.ljust(width) + "".join(_percent(cells.get((name, n))) for n in lengths) for name in names]
    return "\n".join([head, "-" * len(head), *rows])


def _percent(score: float | None) -> str:
    return f"{'-' if score is None else f'{100 * score:.0f}':>8}"
