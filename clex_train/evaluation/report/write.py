"""The report's files: `index.html`, a PNG of each figure, `perplexity.md` and `report.json`.

write(collect([Path("runs/a"), Path("runs/b")]), Path("runs/report"), command)
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clex_train import tracking
from clex_train.evaluation.report import gallery, page, text
from clex_train.evaluation.report.evidence import Evidence
from clex_train.evaluation.report.figures.figure import Absent, Figure
from clex_train.evaluation.report.sources import Source, of_evaluation, of_training
from clex_train.evaluation.report.table import Curve, Table
from clex_train.evaluation.results import LARGEST
from clex_train.files import BadFile, write_together
from clex_train.records import read_record

INDEX, MARKDOWN, JSON = "index.html", "perplexity.md", "report.json"


@dataclass(frozen=True)
class _Former:
    """What is read of an earlier report."""

    figures: list[dict[str, Any]]


def write(evidence: Evidence, folder: Path, command: Sequence[str]) -> str:
    """Write the report into `folder` and return its tables for the console; `command` is what was called.

    PNGs of figures that an earlier report in the folder had, and this one has not, are removed. An `OSError` names the
    file that it is about, and an earlier report stays as it was.
    """
    figures, absent = gallery.figures(evidence)
    made = {
        "command": shlex.join(command),
        "git_commit": tracking.git_commit() or "not recorded",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    made_by = f"Written {made['date']} by {made['command']}, commit {made['git_commit']}."
    content = as_json(evidence, figures, absent) | made
    contents: dict[str, bytes | str] = {f"{figure.name}.png": gallery.png(figure) for figure in figures}
    contents[MARKDOWN] = text.markdown(evidence.tables)
    contents[JSON] = json.dumps(content, indent=1, allow_nan=False) + "\n"
    contents[INDEX] = page.page(evidence, figures, absent, made_by)
    former = _former_figures(folder)
    write_together(folder, contents)
    for name in former - contents.keys():
        (folder / name).unlink(missing_ok=True)
    return "\n\n".join(text.console(table) for table in evidence.tables)


def as_json(evidence: Evidence, figures: Sequence[Figure], absent: Sequence[Absent]) -> dict[str, Any]:
    """Everything that the page shows, with the command, the weights and the data behind every row and figure."""
    return {
        "tables": [_table(table, evidence) for table in evidence.tables],
        "tasks": [
            {
                "label": scores.label,
                "task": scores.task,
                "rows": [vars(row) for row in scores.rows],
                "source": _facts(of_evaluation(scores.path, scores.origin, evidence.runs)),
            }
            for scores in evidence.tasks
        ],
        "runs": [{"label": run.label, "source": _facts(of_training(run))} for run in evidence.runs],
        "figures": [
            {
                "file": f"{figure.name}.png",
                "title": figure.title,
                "caption": figure.caption,
                "sources": [_facts(source) for source in figure.sources],
            }
            for figure in figures
        ],
        "not_shown": [asdict(each) for each in absent],
    }


def _table(table: Table, evidence: Evidence) -> dict[str, Any]:
    return {
        "title": table.title,
        "caption": table.caption,
        "context_len": table.context_len,
        "lengths": table.lengths,
        "windows": table.windows,
        "rows": [_row(curve, evidence) for curve in table.curves],
    }


def _row(curve: Curve, evidence: Evidence) -> dict[str, Any]:
    return {
        "label": curve.label,
        "method": curve.method,
        "protocol": curve.protocol,
        "context_len": curve.context_len,
        "num_tokens": {n: score.num_tokens for n, score in curve.scores.items()},
        "fingerprint": {n: score.fingerprint for n, score in curve.scores.items()},
        "perplexity": {n: p if math.isfinite(p) else None for n, p in curve.perplexity.items()},
        "standard_error": {n: score.standard_error for n, score in curve.scores.items()},
        "source": _facts(of_evaluation(curve.path, curve.origin, evidence.runs)),
    }


def _facts(source: Source) -> dict[str, str]:
    return {"title": source.title, **dict(source.facts)}


def _former_figures(folder: Path) -> set[str]:
    """Name the PNGs that an earlier report in the folder says that it wrote."""
    try:
        former = read_record(folder / JSON, _Former, within=folder, most=LARGEST)
    except (FileNotFoundError, BadFile):
        return set()
    names = {Path(str(figure.get("file"))).name for figure in former.figures}
    return {name for name in names if name.endswith(".png")}
