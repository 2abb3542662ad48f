"""Scores that the harness returns: by task and method, without lengths that were not run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

NOT_RUN = -1
"""Score of lm-eval's multi-length tasks for a length without prompts."""


@dataclass(frozen=True)
class Value:
    """A score with its standard error."""

    value: float
    error: float | None
    """None if lm-eval gives none, as for a single row."""

    def text(self, scale: float, digits: int) -> str:
        """Format both, multiplied by `scale`."""
        error = f" ± {self.error * scale:.{digits}f}" if self.error is not None else ""
        return f"{self.value * scale:.{digits}f}{error}"


class Found(NamedTuple):
    """The harness's results on the unchanged model, or by a method."""

    method: str
    """Empty for the unchanged model."""
    frequencies: str
    results: dict[str, Any]
    prompts: dict[str, dict[str, int]]
    """By task: number of prompts, and of those that lost tokens (`num_shortened`)."""

    def metrics(self) -> dict[str, float]:
        """Return values by key."""
        return metrics(self.results, self.method)

    def values(self) -> dict[str, dict[str, Value]]:
        """Return values with their standard errors by task and metric; a filter follows its metric after a slash."""
        return {task: _values(row) for task, row in self.results["results"].items()}


def _values(row: Mapping[str, Any]) -> dict[str, Value]:
    found = {}
    for name, value in row.items():
        metric, _, filtered = name.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            # lm-eval writes "N/A" for an error that it cannot estimate.
            error = row.get(f"{metric}_stderr,{filtered}")
            exact = float(error) if isinstance(error, (int, float)) else None
            found[metric if filtered == "none" else f"{metric}/{filtered}"] = Value(float(value), exact)
    return found


def remove_not_run(results: dict[str, Any]) -> list[str]:
    """Remove metrics of lengths without prompts, which lm-eval marks by a score of -1; return their names."""
    # RULER's tasks have a metric named after each of its standard lengths, requested or not.
    names = []
    for group in ("results", "groups"):
        for task, row in results.get(group, {}).items():
            for metric in [metric for metric, value in row.items() if _is_not_run(metric, value)]:
                del row[metric]
                row.pop(metric.replace(",", "_stderr,"), None)
                names.append(f"{task}/{metric.partition(',')[0]}")
    return list(dict.fromkeys(names))


def _is_not_run(metric: str, value: object) -> bool:
    return metric.partition(",")[0].isdecimal() and value == NOT_RUN


def metrics(results: Mapping[str, Any], method: str = "") -> dict[str, float]:
    """Flatten the harness's results to `lm_eval/<task>[/<method>]/<metric>[/<filter>]` -> value.

    Standard errors have the metric's name with `_stderr`.
    """
    found, by = {}, f"{method}/" if method else ""
    for task, row in results["results"].items():
        for name, value in row.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, (int, float)):
                found[f"lm_eval/{task}/{by}{metric}" + ("" if filtered == "none" else f"/{filtered}")] = float(value)
    return found
