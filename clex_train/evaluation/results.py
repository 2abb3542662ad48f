"""Results of an evaluation, and the JSON file that stores them with everything needed to repeat or compare them.

The file has each window's summed nll and document, so that paired comparisons by document need no second run.
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

from clex_train.evaluation.measure_scores import MeasureScore, measure_metrics, to_row
from clex_train.evaluation.task_scores import TaskScore, task_metrics
from clex_train.utils.bootstrap import Difference, paired_difference, standard_errors
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile, make_folder, write_atomically
from clex_train.utils.records import Count, convert, read_json

FORMAT = 1
LARGEST = 2**28
"""Largest evaluation file that is read, in bytes. Each window takes about 20 per cell."""

Length = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]

NO_WINDOWS: dict[str, Any] = {"count": 0, "length": 0, "documents": [], "fingerprint": ""}
"""Value of `windows` in an evaluation of retrieval alone."""


# Fields of files are added with defaults and never renamed: older files must stay readable and comparable.
@dataclass(frozen=True)
class Score:
    """One cell of the table: a method under a protocol at a length."""

    method: str
    protocol: str
    length: Length
    """Context length in tokens."""
    frequencies: str
    """Source of the frequency table: `clex`, `none`, `ntk`, ..."""
    t: float
    """Scale factor at the window's full length."""
    window_nll: list[float]
    """[W]: summed negative log-likelihood of each window's scored tokens, in nats."""
    num_tokens: Length
    """Scored tokens of all windows together."""
    seconds: float
    """Wall time of the forward passes; protocols that read the same spans share them, and their time."""
    fingerprint: str = ""
    """Hash of the scored tokens, 16 hex digits: equal for equal tokens only."""
    standard_error: float | None = None
    """Standard error of the perplexity, by a bootstrap over documents; None with the reason in the note."""
    mean_nll_standard_error: float | None = None
    """Standard error of the mean nll in nats per token; None likewise."""
    standard_error_note: str = ""
    """Reason for a missing standard error."""
    curve: tuple[tuple[int, float, int], ...] = ()
    """For `per_position`: (position in the span, mean nll, scored tokens) of equal bins of positions."""
    copied_from: str = ""
    """Key of the score that this one equals by definition and was copied from; empty if it was computed."""
    window_tokens: list[int] = field(default_factory=list)
    """[W]: scored tokens of each window, where they differ (`long_ppl`); empty where all windows have as many."""

    @property
    def tokens_by_window(self) -> list[int]:
        """Scored tokens of each window, [W]."""
        return self.window_tokens or [self.num_tokens // len(self.window_nll)] * len(self.window_nll)

    @property
    def key(self) -> str:
        """`perplexity/<method>/<protocol>/<length>`."""
        return score_key(self.method, self.protocol, self.length)

    @property
    def mean_nll(self) -> float:
        """Nats per scored token."""
        # fsum: the order of the windows must not change the last digit.
        return math.fsum(self.window_nll) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(mean nll); infinite on overflow."""
        # `not >`, so that a NaN stays NaN. exp overflows float64 at 709, and Python's raises instead of returning inf.
        return math.exp(self.mean_nll) if not self.mean_nll > 700 else math.inf


def score_key(method: str, protocol: str, length: int) -> str:
    """Return `perplexity/<method>/<protocol>/<length>`."""
    return f"perplexity/{method}/{protocol}/{length}"


def exact_score(row: Mapping[str, Any]) -> Score:
    """Convert `vars(score)` back after a round trip through JSON. Raises `ValueError` for anything else."""
    return convert(row, Score)


def measure_score(row: Mapping[str, Any]) -> MeasureScore:
    """Convert a row of `to_row` back after a round trip through JSON. Raises `ValueError` for anything else."""
    fields = {name: value for name, value in row.items() if name != "value"}
    # Sums that are not finite are null in the file.
    fields["sums"] = [math.nan if one is None else one for one in row["sums"]]
    return convert(fields, MeasureScore)


@dataclass(frozen=True)
class Tax:
    """Perplexity of a method at the shortest length against the base that was trained on."""

    method: str
    protocol: str
    length: int
    percent: float | None
    """By how much the perplexity is higher, in percent; None if it is not finite."""
    standard_error: float | None
    """Standard error of the percentage, paired by document; None with the reason in the note."""
    note: str
    baseline: str
    """Label and method of the base's evaluation."""


@dataclass(frozen=True)
class Missing:
    """A table cell that ran out of memory."""

    method: str
    protocol: str
    """Protocol or retrieval task."""
    length: int
    """Length in tokens."""
    reason: str
    """The allocator's message, and the rank."""


@dataclass(frozen=True)
class Results:
    """All scores of one set of weights on one set of windows."""

    scores: list[Score]
    context_len: int
    """L in tokens."""
    windows: dict[str, Any]
    """Count, length and fingerprint of the windows, and document and start of each."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Scores of retrieval, if configured."""
    missing: list[Missing] = field(default_factory=list)
    """Cells that ran out of memory."""
    measures: list[MeasureScore] = field(default_factory=list)
    """Scores by teacher forcing, if configured."""
    taxes: list[Tax] = field(default_factory=list)
    """Short-context taxes, where a baseline is named."""

    def metrics(self) -> dict[str, float]:
        """Map the keys of scores, tasks and measures, such as `perplexity/<method>/<protocol>/<length>`, to values."""
        perplexity = {score.key: score.perplexity for score in self.scores}
        taxes = {f"tax/{t.method}/{t.protocol}/{t.length}": t.percent for t in self.taxes if t.percent is not None}
        return perplexity | task_metrics(self.tasks) | measure_metrics(self.measures) | taxes


@dataclass(frozen=True)
class Origin:
    """Provenance of an evaluation."""

    label: str
    """Short name for tables and plots."""
    command: list[str]
    """Command line of the program."""
    model: dict[str, Any]
    """Path, optimizer step and hash of the weights, as far as they exist."""
    data: dict[str, Any]
    """Path and fingerprint of the token store."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, number of ranks, dtype."""
    request: dict[str, Any] = field(default_factory=dict)
    """Settings that affect the numbers; empty for an evaluation inside a run, and in older files."""

    def repeats(self, other: Origin) -> bool:
        """Return True if both have the same settings, weights and data, so that one may replace the other."""
        # A hash identifies weights wherever they are; hub models have none and are identified by name and revision.
        same_weights = (self.model.get("hash") or _named(self.model)) == (
            other.model.get("hash") or _named(other.model)
        )
        same_data = self.data.get("fingerprint") == other.data.get("fingerprint")
        return bool(self.request) and self.request == other.request and same_weights and same_data


def _named(model: Mapping[str, Any]) -> tuple[Any, Any]:
    return model.get("path"), model.get("revision")


def write(path: Path, results: Results, origin: Origin) -> None:
    """Write an evaluation as JSON, creating parent folders. Numbers that are not finite become null."""
    make_folder(path.parent)
    content = {
        "format": FORMAT,
        **vars(origin),
        "context_len": results.context_len,
        "windows": results.windows,
        "metrics": {key: _finite(value) for key, value in results.metrics().items()},
        "scores": [_score_row(score) for score in results.scores],
        "tasks": [vars(score) for score in results.tasks],
        "measures": [to_row(score) for score in results.measures],
        "taxes": [vars(tax) for tax in results.taxes],
        "missing": [vars(cell) for cell in results.missing],
    }
    # `allow_nan=False` catches a NaN that was missed above: it is not JSON, and strict readers would refuse the file.
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def place(wished: Path, origin: Origin) -> Path:
    """Choose the first of x.json, x_2.json, x_3.json, ... that is free or has the same evaluation."""
    # Never overwrite the result of another evaluation, which may have taken hours.
    numbered = (wished if number == 1 else wished.with_stem(f"{wished.stem}_{number}") for number in count(1))
    return next(path for path in numbered if not path.exists() or _is_repeated(path, origin))


def _is_repeated(path: Path, origin: Origin) -> bool:
    try:
        return origin.repeats(_origin(_content(path)))
    except (ValueError, KeyError):
        return False


def read(path: Path) -> tuple[Results, Origin]:
    """Read an evaluation that `write` wrote. Raises `ConfigError` for a missing or damaged file."""
    content = _content(path)
    try:
        return _results(content), _origin(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(path, None, f"damaged or of another version ({first_line(error)}); evaluate again") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, within=path.parent, most=LARGEST)
    except (FileNotFoundError, BadFile) as error:
        raise ConfigError(path, None, f"cannot be read as an evaluation ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            path, None, f"not an evaluation of format {FORMAT}; create it again with clex_train.cli.evaluate"
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
        # In old files, the fingerprint in `windows` covers the scored tokens; that of the windows is unknown.
        scores = [_older(row, windows) for row in rows]
        return Results(scores, content["context_len"], {**windows, "fingerprint": ""}, tasks, missing)
    measures = [measure_score(row) for row in content.get("measures", [])]
    taxes = convert(content.get("taxes", []), list[Tax])
    scores = [_score(row) for row in rows]
    return Results(scores, content["context_len"], windows, tasks, missing, measures, taxes)


def compare(first: Score, second: Score, documents: Sequence[int]) -> Difference:
    """Subtract the mean nll of `second` from that of `first`, paired by document; `documents` [W] from the results.

    Raises `ConfigError` when the two scored different tokens.
    """
    if first.fingerprint != second.fingerprint:
        raise ConfigError(
            f"{first.key} and {second.key}", None, "scored different tokens; compare methods under one protocol"
        )
    return paired_difference(first.window_nll, second.window_nll, first.tokens_by_window, documents)


def with_standard_errors(score: Score, documents: Sequence[int]) -> Score:
    """Add standard errors to a score; `documents` [W] is the document of each window."""
    errors = standard_errors(score.window_nll, score.tokens_by_window, documents)
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
    # Older files lack these two, because nothing was copied, and all windows had equally many scored tokens.
    fields: dict[str, Any] = {
        name: {"copied_from": "", "window_tokens": [], **row}[name] for name in Score.__dataclass_fields__
    }
    fields["window_nll"] = [math.nan if value is None else value for value in row["window_nll"]]
    fields["curve"] = tuple((place, math.nan if nll is None else nll, count) for place, nll, count in row["curve"])
    return convert(fields, Score)


@dataclass(frozen=True)
class _Windows:
    """Fields of `windows` that tables read."""

    count: Count
    length: Count
    documents: list[int] = field(default_factory=list)


def _require_windows(rows: Any, windows: Any) -> None:
    """Raise `ValueError` when a field of the windows is missing, or the scores do not belong to them."""
    documents = convert(windows, _Windows).documents
    lengths = {len(row["window_nll"]) for row in rows}
    # A stream is read in segments, which have no documents.
    if documents and lengths - {len(documents)}:
        raise ValueError(f"scores of {sorted(lengths)} windows, and {len(documents)} windows")


def _older(row: Mapping[str, Any], windows: Mapping[str, Any]) -> Score:
    """Convert a row of an old file: one set of scored tokens for all protocols, and no standard errors."""
    fields = {name: row[name] for name in Score.__dataclass_fields__ if name in row}
    score = _score({**vars(Score(**fields)), "fingerprint": windows["fingerprint"]})
    return with_standard_errors(score, windows["documents"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
