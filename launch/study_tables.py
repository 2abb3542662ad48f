"""Tables of the study from its evaluation files: perplexity, and the difference of each arm from CLEX, by book.

perplexity = exp(mean nll),  the nll of a window averaged over the seeds of an arm
standard errors from resampled books, with the same draws for both sides of a difference
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clex_train.config.method import Method
from clex_train.evaluation import results
from clex_train.evaluation.tables import Row
from clex_train.report.evidence import from_rows
from clex_train.report.write import write as write_report
from clex_train.scaling import methods
from clex_train.utils import bootstrap
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import make_folder, write_atomically
from launch.study_arms import ABLATIONS, BASE_METHODS, CHOOSING, JUDGING, MAIN, Arm, Windows

BASE_FILE = Path("base") / "evaluation" / f"{JUDGING.name}.json"
CHOSEN = next(arm.label for arm in MAIN if arm.name == "clex_t_factor_2")
BASE_DRAWN = ("none", "ntk", "yarn", "lm_infinite")
DRAWN = ("one_shot", "per_position", "last_k")
PROTOCOLS = ("one_shot", "last_k")
FORMULA_NAMES = {name: methods.create(Method(name)).label for name in BASE_METHODS}


@dataclass(frozen=True)
class Line:
    """Row of a table: one method on the weights of one arm, over its seeds."""

    label: str
    nll: dict[int, np.ndarray]
    """Length -> [seeds, windows], summed NLL of each window's scored tokens, in nats."""
    tokens: list[int]
    """[windows]: scored tokens of each window."""
    documents: np.ndarray
    """[windows]: book of each window."""

    @property
    def num_seeds(self) -> int:
        """Number of runs that this row is the mean of."""
        return len(next(iter(self.nll.values())))


def write(out: Path, seeds: Sequence[int]) -> str:
    """Write `OUT/report/tables.md` from the evaluations so far, and return its text."""
    parts = [section(out, seeds, protocol) for protocol in PROTOCOLS]
    text = "\n\n".join(parts) + "\n"
    path = out / "report" / "tables.md"
    make_folder(path.parent)
    write_atomically(path, text)
    return text


def page(out: Path, seed: int, command: Sequence[str]) -> Path:
    """Write the report of the first seed's main arms to `OUT/report`, and return its page."""
    files = {out / arm.name / f"seed_{seed}" / "evaluation" / f"{JUDGING.name}.json": arm for arm in MAIN}
    rows = [Row(f"base, {FORMULA_NAMES[m]}", out / BASE_FILE, m, p) for p in DRAWN for m in BASE_DRAWN]
    rows += [Row(arm.label, path, arm.methods[0], p) for p in DRAWN for path, arm in files.items() if path.exists()]
    write_report(from_rows(rows), out / "report", command)
    return out / "report" / "index.html"


def section(out: Path, seeds: Sequence[int], protocol: str) -> str:
    """Format the main table, the differences from CLEX, and the ablations, under one protocol."""
    base = [
        row
        for method in BASE_METHODS
        for row in line(f"base, {FORMULA_NAMES[method]}", [out / BASE_FILE], method, protocol)
    ]
    parts = _pair(f"{protocol}: perplexity", [*base, *arm_lines(out, MAIN, seeds, protocol, JUDGING)], CHOSEN)
    single = list(arm_lines(out, ABLATIONS, seeds[:1], protocol, CHOOSING))
    return "\n\n".join(parts + _pair(f"{protocol}: one seed, for choosing", single, ABLATIONS[0].label))


def _pair(title: str, rows: Sequence[Line], reference: str) -> list[str]:
    """Format a table of perplexities, and one of differences from the row `reference` if it has been evaluated."""
    # A protocol that has not been evaluated yet leaves its section out.
    if not rows:
        return []
    parts = [f"### {title}", table(rows, perplexity_cell)]
    found = [row for row in rows if row.label == reference]
    return [*parts, f"### {title}, percent above `{reference}`", table(rows, against(found[0]))] if found else parts


def arm_lines(out: Path, arms: Iterable[Arm], seeds: Sequence[int], protocol: str, windows: Windows) -> Iterable[Line]:
    """Yield a row for every method of every arm that has been evaluated."""
    for arm in arms:
        for method in arm.methods:
            label = arm.label if len(arm.methods) == 1 else f"{arm.label}, {FORMULA_NAMES[method]}"
            files = [out / arm.name / f"seed_{seed}" / "evaluation" / f"{windows.name}.json" for seed in seeds]
            yield from line(label, files, method, protocol)


def line(label: str, files: Iterable[Path], method: str, protocol: str) -> Iterable[Line]:
    """Yield the row of a method over several runs; nothing if none of them has been evaluated."""
    found = [results.read(path)[0] for path in files if path.exists()]
    scores = [[s for s in one.scores if (s.method, s.protocol) == (method, protocol)] for one in found]
    if not scores or not scores[0]:
        return
    # Paired differences need the same tokens in the same order.
    if len({score.fingerprint for run_scores in scores for score in run_scores}) > 1:
        raise ConfigError(label, None, "its runs scored different tokens; remove their evaluation files and run again")
    lengths = [score.length for score in scores[0]]
    nll = {n: np.array([next(s.window_nll for s in run if s.length == n) for run in scores]) for n in lengths}
    documents = np.array(found[0].windows["documents"])
    yield Line(label, nll, scores[0][0].tokens_by_window, documents)


def table(rows: Sequence[Line], cell: Callable[[Line, int], str]) -> str:
    """Format a Markdown table with a row per line and a column per length."""
    lengths = sorted({length for row in rows for length in row.nll})
    head = ["", *(f"{length // lengths[0]}x ({length})" for length in lengths), "seeds"]
    body = [[row.label, *(cell(row, length) for length in lengths), str(row.num_seeds)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---", *["---:"] * (len(head) - 1)], *body])


def perplexity_cell(row: Line, length: int) -> str:
    """Format the perplexity and its standard error by book."""
    # Average the seeds first: the error is that of the books, not of the training noise.
    nll, tokens = row.nll[length].mean(axis=0), row.tokens
    error = bootstrap.standard_errors(nll.tolist(), tokens, row.documents.tolist()).perplexity
    return f"{float(np.exp(nll.sum() / sum(tokens))):.2f} ± {_or_nan(error):.2f}"


def against(reference: Line) -> Callable[[Line, int], str]:
    """Return a function that formats how far a row lies above `reference`, with the paired standard error."""

    def cell(row: Line, length: int) -> str:
        if row.label == reference.label:
            return "0"
        own, other = (side.nll[length].mean(axis=0).tolist() for side in (row, reference))
        mean, error, _ = bootstrap.paired_difference(own, other, row.tokens, row.documents.tolist())
        # A difference of mean NLL is a ratio of perplexities; the delta method carries the error over.
        return f"{100 * np.expm1(mean):+.1f} ± {100 * np.exp(mean) * _or_nan(error):.1f}"

    return cell


def _or_nan(error: float | None) -> float:
    # A single book cannot be resampled.
    return float("nan") if error is None else error
