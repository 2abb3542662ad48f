"""Stages of the studies: a command, the file that shows that it is done, and a log of its own."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from launch import stages


def run(out: Path, result: Path, command: list[str]) -> None:
    """Run a command unless its result exists, with its output in a file in OUT/log.

    Raises:
        subprocess.CalledProcessError: it failed; its `output` is the log.
    """
    if result.exists():
        return
    log = out / "log" / ("_".join(os.path.relpath(result, out).split(os.sep)).removesuffix(result.suffix) + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"--- {shlex.join(command)}\n    > {log}", flush=True)
    with log.open("w", encoding="utf-8") as output:
        # One thread each: parallel processes with all cores each would slow each other down.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = stages.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if code:
        raise subprocess.CalledProcessError(code, command, output=str(log))


def failed(error: subprocess.CalledProcessError) -> int:
    """Report a failed stage by its log and the last line in it; return the exit code."""
    # The log of a stage may be cut within a character when it was killed.
    lines = Path(error.output).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    print(f"error: exit code {error.returncode}, {error.output}: {last}", file=sys.stderr)
    return int(error.returncode)


def at_least_one(text: str) -> int:
    """Parse a number of processes or steps; `ArgumentTypeError` below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number
