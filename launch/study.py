"""Study behind docs/results.md: one base model, every method fine-tuned from it with the same budget, one table.

    python -m launch.study --books 'DIR/*.jsonl.zst' [--out runs/study] [--jobs 2] [--seeds 1 2 3] [--smoke]

    1 corpus      a tokenizer and a token store of the books, with a share of whole books held out
    2 base        a small Llama with plain RoPE                          train.py +experiment=study_base
    3 arms        each arm of `study_arms` from that base, per seed      train.py +experiment=study_finetune scaling=...
    4 evaluation  on held-out windows, separate ones for model selection    clex_train.cli.evaluate run=...
    5 tables      means over seeds, standard errors by book; a page      OUT/report/tables.md, OUT/report/index.html

A stage whose result exists is skipped, and an interrupted training run resumes from its checkpoint: run the same
command again to continue. `--jobs` processes of one thread each run in parallel.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from launch import stages

    stages.listen()

from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import terminal
from clex_train.utils.errors import ConfigError, InputError
from clex_train.utils.files import require_writable_folder
from clex_train.utils.locations import ROOT
from data_prep.config import Format
from data_prep.corpus.sources import expand
from launch import stages, study_tables
from launch.study_arms import ABLATIONS, BASE_METHODS, CHOOSING, JUDGING, MAIN, Arm, Windows

CONTEXT_LEN = 128
LENGTHS = [CONTEXT_LEN * multiple for multiple in (1, 2, 4, 8, 16)]
PROTOCOLS = "protocols=[one_shot,last_k,per_position]"
SMOKE = ["optim.steps=6"]


@dataclass(frozen=True)
class Study:
    """Paths of the study and the part of it to run."""

    books: str
    out: Path
    seeds: list[int]
    smoke: bool
    only: list[str] | None = None

    @property
    def store(self) -> Path:
        """Token store of the books."""
        return self.out / "books"

    @property
    def base(self) -> Path:
        """Run folder of the base model."""
        return self.out / "base"

    def waves(self) -> list[list[tuple[Arm, int]]]:
        """Group (arm, seed) pairs into those that train and those that evaluate another arm's weights."""
        # Ablations come first, with one seed: they decide the recipe of the main arms, which run with all seeds.
        pairs = [(arm, self.seeds[0]) for arm in ABLATIONS] + [(arm, seed) for seed in self.seeds for arm in MAIN]
        wanted = [(arm, seed) for arm, seed in pairs if self.only is None or arm.name in self.only]
        return [[pair for pair in wanted if (pair[0].weights_of is None) == trains] for trains in (True, False)]


def main() -> int:
    """Run the missing stages; return 1 if a stage failed (after trying the others), 2 for unusable input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="files of books, a glob that the corpus `local_books` can read")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--jobs", type=at_least_one, default=2, help="parallel processes, of one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    names = [arm.name for arm in (*MAIN, *ABLATIONS)]
    only = "run only these arms; their names are in study_arms.py"
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=names, help=only)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    study = Study(args.books, args.out, args.seeds, args.smoke, args.only)
    os.chdir(ROOT)
    try:
        require_usable(study)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        corpus(study)
        train(study, study.base, "study_base", [])
        evaluate(study, study.base, BASE_METHODS, study.base, JUDGING)
        # Threads suffice: each one waits for a subprocess.
        with ThreadPoolExecutor(args.jobs) as pool:
            codes = [code for wave in study.waves() for code in pool.map(partial(run_arm, study), wave)]
    except subprocess.CalledProcessError as error:
        return failed(error)
    except Interrupted as interrupt:
        return stages.ended(interrupt)
    print(study_tables.write(study.out, study.seeds))
    page = study_tables.page(study.out, study.seeds[0], [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    print(f"the page of the first seed: {page}")
    return int(any(codes))


def at_least_one(text: str) -> int:
    """Parse a number of processes; `ArgumentTypeError` below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def require_usable(study: Study) -> None:
    """Raise `ConfigError` if nothing can be written, or if the store is missing and there are no files to make it."""
    require_writable_folder("--out", study.out, study.out)
    try:
        if not study.store.exists():
            expand([study.books], Format.auto)
    except InputError as error:
        remedy = "name files that the corpus local_books can read, a glob in quotes"
        raise ConfigError("--books", study.books, f"{str(error).rpartition(': ')[2]}; {remedy}") from error


def corpus(study: Study) -> None:
    """Make the tokenizer and the token store."""
    # Of the 15 books that the share was chosen for, it holds out 5: their hashes are not spread evenly.
    books = ["+corpus=local_books", f"corpus.paths=[{study.books!r}]", "corpus.validation_share=0.55"]
    prepare = [sys.executable, "-m", "data_prep"]
    tokenizer = study.out / "tokenizer"
    stage(study, tokenizer, [*prepare, "train_tokenizer", *books, "vocab_size=2048", f"output={tokenizer}"])
    stage(study, study.store, [*prepare, "tokenize", *books, f"tokenizer={tokenizer}", f"output={study.store}"])


def run_arm(study: Study, arm_and_seed: tuple[Arm, int]) -> int:
    """Train and evaluate one arm; return the exit code of the failed stage, or 0."""
    arm, seed = arm_and_seed
    own = study.out / arm.name / f"seed_{seed}"
    weights = study.out / (arm.weights_of or arm.name) / f"seed_{seed}"
    overrides = [f"model.path={study.base / 'final'}", f"seed={seed}", *arm.overrides]
    try:
        if arm.weights_of is None:
            train(study, own, "study_finetune", overrides)
        evaluate(study, weights, arm.methods, own, CHOOSING if arm in ABLATIONS else JUDGING, arm.evaluation)
    except subprocess.CalledProcessError as error:
        return failed(error)
    return 0


def train(study: Study, run: Path, experiment: str, overrides: Iterable[str]) -> None:
    """Train one model in one process."""
    command = [sys.executable, "train.py", f"+experiment={experiment}", f"data.path={study.store}", *overrides]
    stage(study, run / "final", [*command, f"output_dir={run}", *(SMOKE if study.smoke else [])])


def evaluate(
    study: Study, run: Path, methods: Iterable[str], folder: Path, windows: Windows, overrides: Iterable[str] = ()
) -> None:
    """Evaluate a run's final model with each method, at every length, into a folder's evaluations."""
    output = folder / "evaluation" / f"{windows.name}.json"
    command = [sys.executable, "-m", "clex_train.cli.evaluate", f"run={run}", f"methods=[{','.join(methods)}]"]
    command += [f"lengths={LENGTHS}".replace(" ", ""), PROTOCOLS, f"context_len={CONTEXT_LEN}", f"seed={windows.seed}"]
    command += overrides
    stage(study, output, [*command, f"num_windows={5 if study.smoke else 30}", f"output={output}"])


def stage(study: Study, result: Path, command: list[str]) -> None:
    """Run a command unless its result exists, with its output in a file in OUT/log."""
    if result.exists():
        return
    log = study.out / "log" / ("_".join(result.relative_to(study.out).with_suffix("").parts) + ".txt")
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


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
