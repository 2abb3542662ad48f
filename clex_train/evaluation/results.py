"""The outcome of an evaluation, and the JSON file that keeps it with everything needed to repeat or compare it.

Beside the perplexities the file holds each window's summed nll and its document, so that paired comparisons by
document need no second run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import msgspec

from clex_train.evaluation.bootstrap import Difference, paired_difference, standard_errors
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile, make_folder, write_atomically
from clex_train.utils.records import convert, read_json

FORMAT = 1
LARGEST = 2**28
"""Bytes of an evaluation file that are read at most: a window takes some 20 a cell."""

Length = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]

MOST_CHARACTERS = 500
"""Of an expected or a given text in a file."""

NO_WINDOWS: dict[str, Any] = {"count": 0, "length": 0, "documents": [], "fingerprint": ""}
"""What stands for the windows where retrieval alone was asked for."""


@dataclass(frozen=True)
class Score:
    """One cell of the table: a method under a protocol at a length."""

    method: str
    protocol: str
    length: Length
    """Tokens of context in a window."""
    frequencies: str
    """What made the frequency table: `clex`, `none`, `ntk`, ..."""
    t: float
    """Scale factor at the window's full length."""
    window_nll: list[float]
    """[W]: summed negative log-likelihood of each window's scored tokens, in nats."""
    num_tokens: Length
    """Scored tokens of all windows together."""
    seconds: float
    """Wall time of the forwards; protocols that read the same spans share them, and the time."""
    fingerprint: str = ""
    """16 hex digits that two scores share exactly if they are of the same tokens."""
    standard_error: float | None = None
    """Of the perplexity, by a bootstrap over documents; None with the reason in `standard_error_note`."""
    mean_nll_standard_error: float | None = None
    """Of the mean nll in nats per token; None likewise."""
    standard_error_note: str = ""
    """Why there is no standard error."""
    curve: tuple[tuple[int, float, int], ...] = ()
    """`per_position`: (position in the window, mean nll, scored tokens) of equal bins of positions."""
    copied_from: str = ""
    """Key of the score that this one equals by definition and was copied from; empty for one of its own forwards."""

    @property
    def key(self) -> str:
        """`perplexity/<method>/<protocol>/<length>`."""
        return score_key(self.method, self.protocol, self.length)

    @property
    def mean_nll(self) -> float:
        """Nats per scored token."""
        return math.fsum(self.window_nll) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean nll; infinite where that overflows."""
        return math.exp(self.mean_nll) if not self.mean_nll > 700 else math.inf


def score_key(method: str, protocol: str, length: int) -> str:
    """Return `perplexity/<method>/<protocol>/<length>`."""
    return f"perplexity/{method}/{protocol}/{length}"


def exact_score(row: Mapping[str, Any]) -> Score:
    """Invert `vars(score)` after a way through JSON; raises `ValueError` for anything else."""
    return convert(row, Score)


@dataclass(frozen=True)
class TaskScore:
    """A retrieval task by a method at a length, and at a depth where it has one."""

    task: str
    method: str
    length: int
    """Tokens of prompt and answer together, at most."""
    depth: float | None
    """Where the answer stands in the text, from 0 (start) to 1 (end)."""
    correct: int
    """Prompts that were answered in full."""
    total: int
    """Prompts."""
    score: float
    """Mean share (0..1) of the expected strings."""
    seed: int | None = None
    """What the prompts are a function of, with task, length and number; None in files of older versions."""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """Of each: number, fingerprint of the tokens read, expected and given texts, share."""
    copied_from: str = ""
    """Key of the score that this one equals by definition and was copied from; empty for one of its own forwards."""

    @property
    def key(self) -> str:
        """`<task>/<method>/<length>`: a mean over depths."""
        return task_key(self.task, self.method, self.length)


def task_key(task: str, method: str, length: int) -> str:
    """Return `<task>/<method>/<length>`."""
    return f"{task}/{method}/{length}"


@dataclass(frozen=True)
class Missing:
    """A cell of the table that memory did not hold."""

    method: str
    protocol: str
    """Or the retrieval task."""
    length: int
    reason: str
    """What the allocator said, and on which rank."""


@dataclass(frozen=True)
class Results:
    """All scores of one set of weights over one set of windows."""

    scores: list[Score]
    context_len: int
    """L, the length that counts as 1x."""
    windows: dict[str, Any]
    """What was read: count, length, fingerprint, document and start of each window."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Retrieval, if it was asked for."""
    missing: list[Missing] = field(default_factory=list)
    """What did not fit into memory."""

    def metrics(self) -> dict[str, float]:
        """`perplexity/<method>/<protocol>/<length>` and `<task>/<method>/<length>` -> value, for files and tracker."""
        return {score.key: score.perplexity for score in self.scores} | task_metrics(self.tasks)


def task_metrics(tasks: Sequence[TaskScore]) -> dict[str, float]:
    """`<task>/<method>/<length>` -> mean score over the prompts of all depths."""
    rows = {score.key: [other for other in tasks if other.key == score.key] for score in tasks}
    return {
        key: sum(row.score * row.total for row in same) / sum(row.total for row in same) for key, same in rows.items()
    }


@dataclass(frozen=True)
class Origin:
    """Where an evaluation comes from."""

    label: str
    """Short name for tables and plots."""
    command: list[str]
    """The command line, or the call for an evaluation inside a run."""
    model: dict[str, Any]
    """Path, optimizer step and hash of the weights, as far as they exist."""
    data: dict[str, Any]
    """Path and fingerprint of the token store."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, number of ranks, dtype."""
    request: dict[str, Any] = field(default_factory=dict)
    """What was asked for, as far as it shapes the numbers; empty for an evaluation inside a run and in older files."""

    def repeats(self, other: Origin) -> bool:
        """Whether both asked the same of the same weights and data, so that one may take the other's place."""
        same_weights = (self.model.get("hash") or _named(self.model)) == (
            other.model.get("hash") or _named(other.model)
        )
        same_data = self.data.get("fingerprint") == other.data.get("fingerprint")
        return bool(self.request) and self.request == other.request and same_weights and same_data


def _named(model: Mapping[str, Any]) -> tuple[Any, Any]:
    return model.get("path"), model.get("revision")


def write(path: Path, results: Results, origin: Origin) -> None:
    """Write one evaluation as JSON; numbers that are not finite become null. Parent folders are made."""
    make_folder(path.parent)
    content = {
        "format": FORMAT,
        **vars(origin),
        "context_len": results.context_len,
        "windows": results.windows,
        "metrics": {key: _finite(value) for key, value in results.metrics().items()},
        "scores": [_score_row(score) for score in results.scores],
        "tasks": [vars(score) for score in results.tasks],
        "missing": [vars(cell) for cell in results.missing],
    }
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def place(wished: Path, origin: Origin) -> Path:
    """The first of x.json, x_2.json, x_3.json, ... that is free, or holds what this evaluation repeats."""
    numbered = (wished if number == 1 else wished.with_stem(f"{wished.stem}_{number}") for number in count(1))
    return next(path for path in numbered if not path.exists() or _is_repeated(path, origin))


def _is_repeated(path: Path, origin: Origin) -> bool:
    try:
        return origin.repeats(_origin(_content(path)))
    except (ValueError, KeyError):
        return False


def read(path: Path) -> tuple[Results, Origin]:
    """The inverse of `write`; `ValueError` names a file that is missing or is no evaluation."""
    content = _content(path)
    try:
        return _results(content), _origin(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(path, None, f"damaged or of another version ({first_line(error)}); evaluate anew") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, within=path.parent, most=LARGEST)
    except (FileNotFoundError, BadFile) as error:
        raise ConfigError(path, None, f"cannot be read as an evaluation ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            path, None, f"not an evaluation of format {FORMAT}; write it anew with clex_train.cli.evaluate"
        )
    return content


def _origin(content: Mapping[str, Any]) -> Origin:
    given = {key: content[key] for key in ("label", "command", "model", "data", "environment")}
    return convert({**given, "request": content.get("request", {})}, Origin)


def _results(content: Mapping[str, Any]) -> Results:
    tasks = convert(content.get("tasks", []), list[TaskScore])
    missing = convert(content.get("missing", []), list[Missing])
    rows, windows = content["scores"], content["windows"]
    _require_windows(rows, windows)
    convert(content["context_len"], Length)
    if any("fingerprint" not in row for row in rows):
        # The fingerprint in `windows` was that of the scored tokens; that of the windows themselves is not known.
        scores = [_older(row, windows) for row in rows]
        return Results(scores, content["context_len"], {**windows, "fingerprint": ""}, tasks, missing)
    return Results([_score(row) for row in rows], content["context_len"], windows, tasks, missing)


def compare(first: Score, second: Score, documents: Sequence[int]) -> Difference:
    """Mean nll of `first` less that of `second`, by the same resampled documents; `documents` [W] from the results.

    Raises `ValueError` if the two scored other tokens.
    """
    if first.fingerprint != second.fingerprint:
        raise ConfigError(
            f"{first.key} and {second.key}", None, "scored different tokens; compare methods under one protocol"
        )
    tokens = [first.num_tokens // len(first.window_nll)] * len(first.window_nll)
    return paired_difference(first.window_nll, second.window_nll, tokens, documents)


def with_standard_errors(score: Score, documents: Sequence[int]) -> Score:
    """The score with its standard errors by document; `documents` [W] says which each window is from."""
    tokens = [score.num_tokens // len(score.window_nll)] * len(score.window_nll)
    errors = standard_errors(score.window_nll, tokens, documents)
    return replace(
        score,
        standard_error=errors.perplexity,
        mean_nll_standard_error=errors.mean_nll,
        standard_error_note=errors.note,
    )


def _score_row(score: Score) -> dict[str, Any]:
    return {
        **vars(score),
        "perplexity": _finite(score.perplexity),
        "mean_nll": _finite(score.mean_nll),
        "window_nll": [_finite(value) for value in score.window_nll],
        "curve": [(position, _finite(nll), count) for position, nll, count in score.curve],
    }


def _score(row: Mapping[str, Any]) -> Score:
    # Older files have copied nothing.
    fields: dict[str, Any] = {name: {"copied_from": "", **row}[name] for name in Score.__dataclass_fields__}
    fields["window_nll"] = [math.nan if value is None else value for value in row["window_nll"]]
    fields["curve"] = tuple((place, math.nan if nll is None else nll, count) for place, nll, count in row["curve"])
    return convert(fields, Score)


def _require_windows(rows: Any, windows: Any) -> None:
    """Raise `ValueError` for windows and scores that are not of each other."""
    documents = convert(windows.get("documents", []), list[int])
    lengths = {len(row["window_nll"]) for row in rows}
    # A stream is read in segments, of no document each.
    if documents and lengths - {len(documents)}:
        raise ValueError(f"scores of {sorted(lengths)} windows, and {len(documents)} windows")


def _older(row: Mapping[str, Any], windows: Mapping[str, Any]) -> Score:
    """A row from when one set of tokens was scored under all protocols and standard errors were left to the reader."""
    fields = {name: row[name] for name in Score.__dataclass_fields__ if name in row}
    score = _score({**vars(Score(**fields)), "fingerprint": windows["fingerprint"]})
    return with_standard_errors(score, windows["documents"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
