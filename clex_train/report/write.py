"""Write the files of a report: `index.html`, a PNG of each figure, `perplexity.md` and `report.json`.

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

from clex_train.evaluation.results import LARGEST
from clex_train.evaluation.tables import Curve, Table, console, markdown
from clex_train.report import page
from clex_train.report.evidence import Evidence, Source, evaluation_source, training_source
from clex_train.report.figures import collect_figures
from clex_train.report.plotting import Absent, Figure, to_png
from clex_train.tracking import environment
from clex_train.utils.files import BadFile, write_together
from clex_train.utils.records import read_record

INDEX, MARKDOWN, JSON = "index.html", "perplexity.md", "report.json"


@dataclass(frozen=True)
class _Earlier:
    """The part of an earlier report.json that is read."""

    figures: list[dict[str, Any]]


def write(evidence: Evidence, folder: Path, command: Sequence[str]) -> str:
    """Write the report into `folder` and return its tables for the console; `command` is the command line.

    Removes PNGs of figures that an earlier report in the folder had and this one has not. An `OSError` names the file
    that it is about, and an earlier report stays as it was.
    """
    figures, absent = collect_figures(evidence)
    made = {
        "command": shlex.join(command),
        "git_commit": environment.git_commit() or "not recorded",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    made_by = f"Written {made['date']} by {made['command']}, commit {made['git_commit']}."
    content = as_json(evidence, figures, absent) | made
    contents: dict[str, bytes | str] = {f"{figure.name}.png": to_png(figure) for figure in figures}
    contents[MARKDOWN] = markdown(evidence.tables)
    contents[JSON] = json.dumps(content, indent=1, allow_nan=False) + "\n"
    contents[INDEX] = page.render(evidence, figures, absent, made_by)
    stale = _earlier_figures(folder) - contents.keys()
    write_together(folder, contents)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return "\n\n".join(console(table) for table in evidence.tables)


def as_json(evidence: Evidence, figures: Sequence[Figure], absent: Sequence[Absent]) -> dict[str, Any]:
    """Return everything that the page shows, with command, weights and data of every row and figure."""
    return {
        "tables": [_table(table, evidence) for table in evidence.tables],
        "tasks": [
            {
                "label": scores.label,
                "task": scores.task,
                "rows": [vars(row) for row in scores.rows],
                "source": _facts(evaluation_source(scores.path, scores.origin, evidence.runs)),
            }
            for scores in evidence.tasks
        ],
        "runs": [{"label": run.label, "source": _facts(training_source(run))} for run in evidence.runs],
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
        "tax": vars(curve.tax) if curve.tax else None,
        "source": _facts(evaluation_source(curve.path, curve.origin, evidence.runs)),
    }


def _facts(source: Source) -> dict[str, str]:
    return {"title": source.title, **dict(source.facts)}


def _earlier_figures(folder: Path) -> set[str]:
    """Name the PNGs that an earlier report in the folder lists."""
    try:
        earlier = read_record(folder / JSON, _Earlier, within=folder, most=LARGEST)
    except (FileNotFoundError, BadFile):
        return set()
    names = {Path(str(figure.get("file"))).name for figure in earlier.figures}
    return {name for name in names if name.endswith(".png")}
