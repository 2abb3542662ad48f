"""What every entry point does around its Hydra main: arguments of launchers, `--help`, errors in one line, exit codes.

0    done            1    a bug or a fault of the machine (with its traceback)
2    the user's input cannot be used; one line says which key and what to do
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

USER_ERROR = 2


def run(main: Callable[[], object], help_text: Callable[[], str] | None = None) -> int:
    """Run a Hydra main; returns the exit code. Launchers' own arguments are taken off `sys.argv` first."""
    sys.argv[1:] = without_launcher_arguments(sys.argv[1:])
    if help_text and any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        print(help_text())
        return 0
    try:
        main()
    except Exception as error:
        from clex_train.cli.errors import explain

        line = explain(error)
        if line is None:
            traceback.print_exc()
            return 1
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {line}", file=sys.stderr)
        return USER_ERROR
    return 0


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """Drop `--local_rank=N` (or `--local_rank N`), which DeepSpeed's launcher adds and Hydra does not know."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def sweep_folder(output_dir: str) -> str:
    """In a multirun, each job's own folder: its overrides are appended to `output_dir`."""
    job = HydraConfig.get()
    if job.mode is not RunMode.MULTIRUN:
        return output_dir
    name = job.job.override_dirname.replace("/", "_") or f"job={job.job.num}"
    return f"{output_dir}/{name}"
