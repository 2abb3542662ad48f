"""Average the last checkpoints of a run into one model.

    python -m clex_train.cli.average run=runs/mine last=3 output=averages/mine_3

The mean of the weights, and of the CLEX field, of the newest `last` checkpoints: a directory like the run's `final/`,
for evaluation, export and further training. The run may be finished or not. Needs no GPU.
`--help` lists every key.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.console import arguments, program
from clex_train.export import average, final
from clex_train.tracking import saved_config
from clex_train.utils import files, log
from clex_train.utils.bounds import MOST_STEPS
from clex_train.utils.errors import require, require_at_most


@dataclass
class AverageConfig:
    """Arguments of the program."""

    run: str | None = None
    """Folder of a training run with its checkpoints, finished or not."""
    last: int = 3
    """Newest checkpoints to average, at least 2. A finished run has one of its last step."""
    output: str | None = None
    """Directory to write; it must not exist yet."""


def main() -> None:
    """Average the checkpoints of the command line; refuse unusable input before weights are read."""
    args = arguments.parse(AverageConfig, sys.argv[1:])
    run, output = checked(args)
    planned = average.plan(run, args.last)
    steps = ", ".join(f"{step:,}" for step in planned.steps)
    print(log.printable(f"average the checkpoints of {run} at steps {steps} to {output}"), file=sys.stderr, flush=True)
    write(planned, output)
    program.echo(f"written to {output}: the mean of steps {steps}")


def write(planned: average.Plan, output: Path) -> None:
    """Average the weights, and write a directory like `final/`, whole or not at all."""
    averaged, t = planned.average(), planned.config.scaling.final_t
    files.make_folder(output.parent)
    final.write(output, planned.loaded, averaged, planned.tokenizer, t, averaged=planned.steps)


def checked(args: AverageConfig) -> tuple[Path, Path]:
    """Return run folder and output; `ConfigError` for arguments that cannot be used."""
    require(bool(args.run), "run", args.run or None, "name the folder of a training run, run=FOLDER")
    require(bool(args.output), "output", args.output or None, "name the directory to write, output=DIR")
    require_at_most(args, "", {"last": MOST_STEPS})
    require(args.last >= 2, "last", args.last, "at least 2 checkpoints; the weights of the last step are in final/")
    run, output = Path(str(args.run)), Path(str(args.output))
    require(run.is_dir(), "run", args.run, "no such folder; give the output_dir of a training run")
    require((run / saved_config.CONFIG).is_file(), "run", args.run, "not a run folder (no config.yaml)")
    files.require_writable_folder("output", output, output.parent, files.SAVING + output.name)
    # A dangling link is in the way too.
    require(not os.path.lexists(output), "output", args.output, "exists already; name another directory")
    return run, output


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, AverageConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
