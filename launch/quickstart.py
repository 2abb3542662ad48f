"""The whole main job on real text that every Python carries: `make quickstart` (or `--smoke` for a few steps).

    1 corpus    the standard library's sources, a byte-level BPE trained on them, a token store
    2 base      a small Llama with plain RoPE               deepspeed train.py +experiment=tiny_base
    3 clex      fine-tuned from it with CLEX                deepspeed train.py +experiment=tiny_clex
    4 more      the base trained on for as many steps       deepspeed train.py +experiment=tiny_continued
    5 report    perplexity at 1x to 16x of the training length, as a page, text, JSON, Markdown and PNG; each run has
                scored the same held-out tokens at its end, the base and the base trained on with other frequencies too

Every stage is the command that a user would type, and is shown before it runs. A finished one is not done again, an
interrupted one continues from its checkpoint, and one whose recipe has changed says so: `make clean` begins anew.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from launch import stages

    stages.listen()

from clex_train.cli.console import GO_ON
from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import terminal
from clex_train.utils.locations import ROOT
from launch import stages

SMOKE_STEPS = {"tiny_base": 40, "tiny_clex": 20, "tiny_continued": 20}
SMOKE_OVERRIDES = ["evaluation.num_windows=2", "tracking.wandb=off"]


def main() -> int:
    """Run the five stages; returns the exit code of the first that fails or is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in about two minutes")
    smoke = parser.parse_args().smoke
    runs = Path("runs/smoke") if smoke else Path("runs")
    os.chdir(ROOT)
    start = time.monotonic()
    try:
        corpus()
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
    """Say in one line how a stage ended before its time."""
    if error.returncode == GO_ON:
        return f"stopped as asked; the same command goes on with this stage: {shlex.join(error.cmd)}"
    return f"error: stage failed with exit code {error.returncode}: {shlex.join(error.cmd)}"


def corpus() -> None:
    """Tokenizer and token store of the standard library's sources."""
    python = [sys.executable, "-m", "data_prep"]
    stage(Path("corpora/stdlib_tokenizer"), [*python, "train_tokenizer", "+corpus=stdlib"])
    stage(Path("corpora/stdlib"), [*python, "tokenize", "+corpus=stdlib"])


def train(name: str, runs: Path, smoke: bool) -> None:
    """One training run by DeepSpeed's launcher."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
    command = [*launcher, "train.py", f"+experiment={name}"]
    if smoke:
        command += [f"optim.steps={SMOKE_STEPS[name]}", f"output_dir={runs / name}", *SMOKE_OVERRIDES]
        command += [] if name == "tiny_base" else [f"model.path={runs / 'tiny_base' / 'final'}"]
    call(command)


def report(runs: Path, smoke: bool) -> None:
    """Print the table and write the page, with JSON, Markdown and PNG beside it."""
    from clex_train.evaluation.report.evidence import of_rows
    from clex_train.evaluation.report.tables import Row
    from clex_train.evaluation.report.write import write

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
    print("\n" + write(of_rows(rows), runs / "report", [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]))
    if smoke:
        print("(a smoke run: these models have hardly been trained)")


def last_evaluation(run: Path) -> Path:
    """The evaluation of a run's last step."""
    return max((run / "evaluation").glob("step_*.json"), key=lambda path: int(path.stem.removeprefix("step_")))


def stage(result: Path, command: list[str]) -> None:
    """Run a command unless its result exists."""
    if result.exists():
        print(f"--- {result} is there already, skipped", flush=True)
    else:
        call(command)


def call(command: list[str]) -> None:
    """Run a command; its output goes straight to the console."""
    print(f"--- {shlex.join(command)}", flush=True)
    if code := stages.run(command):
        raise subprocess.CalledProcessError(code, command)


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
