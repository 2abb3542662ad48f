"""Run an entry point: arguments of launchers, `--help`, errors in one line, exit codes.

0    done            1    a bug or a fault of the machine (with its traceback)
2    the user's input cannot be used (`InputError`, or Hydra's own); one line names the key and the remedy
3    training was stopped to protect the run; one line gives the reason and the last checkpoint;
     of an evaluation: no requested cell fitted into memory;
     of every program: the disk is full, or a quota used up; one line names the file;
     of `data_prep decontaminate`: documents were found on both sides, and no store without them was requested
4    a rank died, froze or hangs; one line names it
141  the reader of the output is gone, as `head` does: the code that a shell gives for SIGPIPE
75   training stopped on request and has a checkpoint (EX_TEMPFAIL of sysexits.h): the same command resumes it
129, 130, 143   ended by SIGHUP, SIGINT or SIGTERM (128 + the signal's number); one line says what is kept
"""

import codecs
import functools
import gc
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from clex_train.console import config_files, flags, overrides
from clex_train.resilience import stop_requests
from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import log, versions
from clex_train.utils.errors import InputError, RankLost, RunStopped, StopRequested, first_line, no_room

logger = log.get(__name__)

FAULT = 1
USER_ERROR = 2
STOPPED = 3
RESUMABLE = 75
READER_GONE = 128 + signal.SIGPIPE
PATIENCE = 2.0
EXIT_CODE_FILE = "CLEX_TRAIN_EXIT_CODE"
_ASCII_FALLBACK = "clex_train.ascii_fallback"
_SUBSTITUTES = {"\u00b1": "~", "\u2026": "~", "\u2013": "-", "\u2014": "-", "\u00d7": "x", "\u2192": ">", "\u2588": "#"}
"""ASCII substitutes of one character each, so that the columns of a table stay aligned."""


class _Failed(SystemExit):
    """Carries an error past Hydra, which would print a line of its own for any `Exception`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


def task(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """Wrap the function below `hydra.main`, so that its errors reach `run` and a sweep stops at the first."""

    @functools.wraps(function)
    def guarded(composed: DictConfig) -> None:
        try:
            config_files.require_texts(OmegaConf.get_type(composed), HydraConfig.get())
            function(composed)
        except Exception as error:
            raise _Failed(error) from error

    return guarded


def run(
    main: Callable[[], object], help_text: Callable[[], str], schema: type | None = None, kept: str = "nothing is kept"
) -> int:
    """Run an entry point's main and return the exit code. Launchers' own arguments are removed from `sys.argv` first.

    Pass the `schema` if Hydra reads `sys.argv`: its text fields then get the text as it was typed. `kept` says what
    survives a signal that ends the program, and whether the same command resumes it.
    """
    watch = stop_requests.signals()
    try:
        if watch:
            watch.unwinds = True
        code = _run(main, help_text, schema)
    except KeyboardInterrupt as interrupt:
        code = _interrupted(interrupt, kept)
    if watch:
        watch.is_leaving = True
        # Skip the final garbage collection, which takes seconds with torch loaded.
        gc.freeze()
    _record(code)
    return code


def _interrupted(interrupt: KeyboardInterrupt, kept: str) -> int:
    """Report on rank 0 which signal ended the program, and return the exit code."""
    # Without a watch, or where a library took over SIGINT, it is Python's own KeyboardInterrupt.
    own = interrupt if isinstance(interrupt, Interrupted) else Interrupted(signal.SIGINT)
    if log.display_rank() == 0:
        print(f"{own}; {own.kept or kept}", file=sys.stderr)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    return 128 + own.number


def _run(main: Callable[[], object], help_text: Callable[[], str], schema: type | None) -> int:
    accept_any_text()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv[1:] = without_launcher_arguments(sys.argv[1:])
    if schema is not None:
        sys.argv[1:] = overrides.for_hydra(schema, sys.argv[1:])
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        echo(help_text())
        return 0
    if log.display_rank() == 0:
        for line in versions.untested_warnings():
            logger.warning("%s", line)
    try:
        if schema is not None:
            config_files.require_few_values(sys.argv[1:])
            sys.argv[1:] = flags.put_last(sys.argv[1:])
        main()
    except (_Failed, Exception) as raised:
        error = raised.error if isinstance(raised, _Failed) else raised
        if (watch := stop_requests.signals()) and watch.interrupted and not isinstance(error, StopRequested):
            # A library turned the interrupt into an error of its own, for instance during its import.
            raise Interrupted(watch.interrupted) from error
        return report(error)
    return 0


def accept_any_text() -> None:
    """Make standard output accept characters that its encoding lacks, such as that of an ASCII terminal.

    Dashes and similar signs become ASCII characters, others (a file's name in another alphabet) escapes.
    """
    codecs.register_error(_ASCII_FALLBACK, _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ASCII_FALLBACK)


def _replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that cannot be encoded; an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    typed = (_SUBSTITUTES.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(typed), error.end


def echo(text: str, end: str = "\n") -> None:
    """Print to standard output and flush. Ends the program without a message, exit code 141, if the reader is gone."""
    try:
        print(log.printable(text), end=end, flush=True)
    except BrokenPipeError:
        # The interpreter flushes the buffer once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(READER_GONE) from None


def write_failure(output: Path, error: OSError, remedy: str) -> RunStopped:
    """Build the error of a program that could not write `output`, as on a full disk; names the file of the OS error."""
    reason = error.strerror or first_line(error)
    return RunStopped(f"output={error.filename or output}: cannot be written ({reason}); {remedy}")


def _record(code: int) -> None:
    """Write the exit code of the first rank that ends, for the job script: torchrun itself always returns 1."""
    file = os.environ.get(EXIT_CODE_FILE)
    if file:
        with suppress(OSError), open(file, "x", encoding="utf-8") as record:
            record.write(f"{code}\n")


def report(error: Exception) -> int:
    """Print the user's mistakes as one line, other errors with their traceback, and return the exit code."""
    if isinstance(error, StopRequested):
        if log.display_rank() == 0:
            print(log.printable(str(error)), file=sys.stderr)
        return RESUMABLE
    line, code = _classify(error)
    if line is None:
        traceback.print_exception(error)
        return FAULT
    rank = log.display_rank()
    if rank:
        # Most errors occur on every rank: rank 0 prints them, and the launcher ends this rank in the meantime.
        time.sleep(PATIENCE)
    print(f"error{f' of rank {rank}' if rank else ''}: {log.printable(line)}", file=sys.stderr)
    return code


def _classify(error: Exception) -> tuple[str | None, int]:
    """Return the line to print and the exit code; None instead of a line asks for a traceback."""
    from clex_train.console.errors import explain

    if isinstance(error, RunStopped):
        return str(error), STOPPED
    if isinstance(error, RankLost):
        return str(error), RankLost.exit_code
    if (full := no_room(error)) is not None and not isinstance(error, InputError):
        file = full.filename or "a file"
        return f"{file}: cannot be written ({full.strerror}); make room and run the same command again", STOPPED
    return explain(error), USER_ERROR


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
    """Return a job's own folder in a multirun: `output_dir` with the overrides that differ between jobs appended."""
    job = HydraConfig.get()
    if job.mode is not RunMode.MULTIRUN:
        return output_dir
    typed = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    swept = {o.key_or_group for o in OverridesParser.create().parse_overrides(typed) if o.is_sweep_override()}
    chosen = [re.sub("['\"]", "", item) for item in job.overrides.task if item.lstrip("+").partition("=")[0] in swept]
    return f"{output_dir}/{','.join(chosen).replace('/', '_') or f'job={job.job.num}'}"
