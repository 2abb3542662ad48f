"""The complete workflow on real text that comes with Python: `make quickstart` (`--smoke` for a few steps).

    1 corpus    the standard library's sources, a byte-level BPE trained on them, a token store
    2 base      a small Llama with plain RoPE               deepspeed train.py +experiment=tiny_base
    3 clex      fine-tuned from it with CLEX                deepspeed train.py +experiment=tiny_clex
    4 more      the base trained for as many extra steps    deepspeed train.py +experiment=tiny_continued
    5 report    perplexity at 1x to 16x of the training length, as HTML, text, JSON, Markdown and PNG; all runs score
                the same held-out tokens at their end, and both base models also with other frequencies

Every stage is a command that a user could type, and is printed before it runs. Finished stages are skipped, interrupted
ones resume from their checkpoint, and a stage whose recipe has changed reports it: `make clean` starts over.
"""

import argparse
import os
import shlex
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
from launch import stages

SMOKE_STEPS = {"tiny_base": 40, "tiny_clex": 20, "tiny_continued": 20}
SMOKE_OVERRIDES = ["evaluation.num_windows=2", "tracking.wandb=off"]


def main() -> int:
    """Run the five stages; return the exit code of the first that fails or is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in about two minutes")
    smoke = parser.parse_args().smoke
    runs = Path("runs/smoke") if smoke else Path("runs")
    # Paths in the configs are relative to the repository.
    os.chdir(ROOT)
    start = time.monotonic()
    try:
        corpus()
        # The order matters: tiny_clex and tiny_continued start from the weights of tiny_base.
        for name in SMOKE_STEPS:
            train(name, runs, smoke)
    except subprocess.CalledProcessError as error:
        print(ended(error), file=sys.stderr)
        return int(error.returncode)
    except Interrupted as interrupt:
        return stages.ended(interrupt)
    report(runs, smoke)
    print(f"\ndone in {(time.monotonic() - start) / 60:.1f} minutes; the report: {runs / 'report' / 'index.html'}")
    return 0


def ended(error: subprocess.CalledProcessError) -> str:
    """Describe in one line how a stage ended early."""
    if error.returncode == RESUMABLE:
        return f"stopped on request; the same command resumes this stage: {shlex.join(error.cmd)}"
    return f"error: stage failed with exit code {error.returncode}: {shlex.join(error.cmd)}"


def corpus() -> None:
    """Make the tokenizer and the token store of the standard library's sources."""
    python = [sys.executable, "-m", "data_prep"]
    stage(Path("corpora/stdlib_tokenizer"), [*python, "train_tokenizer", "+corpus=stdlib"])
    stage(Path("corpora/stdlib"), [*python, "tokenize", "+corpus=stdlib"])


def train(name: str, runs: Path, smoke: bool) -> None:
    """Train one model with DeepSpeed's launcher."""
    # The launcher of this environment, not the first one in PATH; its info log hides the output of the run.
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
    command = [*launcher, "train.py", f"+experiment={name}"]
    if smoke:
        command += [f"optim.steps={SMOKE_STEPS[name]}", f"output_dir={runs / name}", *SMOKE_OVERRIDES]
        command += [] if name == "tiny_base" else [f"model.path={runs / 'tiny_base' / 'final'}"]
    call(command)


def report(runs: Path, smoke: bool) -> None:
    """Print the table and write the report as HTML, JSON, Markdown and PNG."""
    # Imported late: matplotlib takes seconds, and an interrupted stage should end at once.
    from clex_train.evaluation.tables import Row
    from clex_train.report.evidence import from_rows
    from clex_train.report.write import write

    def row(label: str, name: str, method: str) -> Row:
        return Row(label, last_evaluation(runs / name), method)

    rows = [
        row("base", "tiny_base", "none"),
        row("base, PI, untrained", "tiny_base", "pi"),
        row("base, NTK(2t-1), untrained", "tiny_base", "ntk"),
        row("base trained on", "tiny_continued", "none"),
        row("base trained on, then NTK(2t-1)", "tiny_continued", "ntk"),
        row("CLEX", "tiny_clex", "trained"),
    ]
    print("\n" + write(from_rows(rows), runs / "report", [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]))
    if smoke:
        print("(a smoke run: these models have hardly been trained)")


def last_evaluation(run: Path) -> Path:
    """Return the evaluation of a run's last step."""
    return max((run / "evaluation").glob("step_*.json"), key=lambda path: int(path.stem.removeprefix("step_")))


def stage(result: Path, command: list[str]) -> None:
    """Run a command unless its result exists."""
    if result.exists():
        print(f"--- {result} exists, skipped", flush=True)
    else:
        call(command)


def call(command: list[str]) -> None:
    """Run a command with its output on the console."""
    print(f"--- {shlex.join(command)}", flush=True)
    if code := stages.run(command):
        raise subprocess.CalledProcessError(code, command)


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
