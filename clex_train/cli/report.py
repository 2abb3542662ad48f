"""One page out of the evaluations of one or several runs: tables, figures, and the source of every number.

    python -m clex_train.cli.report runs/tiny_clex
    python -m clex_train.cli.report runs/tiny_base runs/tiny_clex output=runs/report
    python -m clex_train.cli.report runs/tiny_clex/evaluation/step_300.json

A run folder stands for its newest evaluation and the others of the same weights. Writes index.html (opens anywhere,
needs no network), a PNG of each figure, perplexity.md and report.json, into the run's own `report/` or, for several,
`runs/report`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.console import arguments, program
from clex_train.measures import tax
from clex_train.report import evidence
from clex_train.report.write import INDEX, write
from clex_train.utils import log
from clex_train.utils.errors import renamed_key, require
from clex_train.utils.files import SAVING, require_writable_folder


@dataclass
class ReportConfig:
    """Arguments of the report program."""

    output: str | None = None
    """Folder to write; by default `report/` in the run folder, or `runs/report` for several."""
    baseline: str | None = None
    """Evaluation file of the base that was trained on: the tables then show the short-context tax against it."""


def main() -> None:
    """Write the report of the runs and files on the command line; nothing is written if one is unusable.

    `RunStopped` if a file cannot be written.
    """
    named = [argument for argument in sys.argv[1:] if "=" not in argument]
    args = arguments.parse(ReportConfig, [argument for argument in sys.argv[1:] if "=" in argument])
    require(len(named) > 0, "runs", named, "name one or more run folders or evaluation files")
    paths = [Path(name) for name in named]
    require(args.output != "", "output", "''", "name a folder for the report, or leave the key out")
    output = Path(args.output) if args.output else default_output(paths)
    require_writable_folder("output", output, output, SAVING + output.name)
    # In this program the key has no group.
    with renamed_key(tax.KEY, "baseline"):
        collected = evidence.collect(paths, args.baseline)
    try:
        tables = write(collected, output, [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    except OSError as error:
        raise program.write_failure(output, error, "make room or name another folder, and report again") from error
    program.echo("\n\n".join([*filter(None, [tables]), f"written to {output / INDEX}"]))


def default_output(named: list[Path]) -> Path:
    """Return the folder of a report without `output`."""
    folders = {evidence.run_folder(evidence.find_evaluation(path)) for path in named}
    return folders.pop() / "report" if len(folders) == 1 else Path("runs/report")


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, ReportConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
